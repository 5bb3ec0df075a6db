"""Sound: files and arrays to samples, levels, segments, spectrograms."""

RATES = range(100, 1_000_001)
"""Sample rates in Hz that can be those of sound; ultrasonic recorders reach 500,000."""
