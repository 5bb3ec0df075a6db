"""Text to the symbols that Kokoro speaks."""
