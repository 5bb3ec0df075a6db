"""Speech codes to a 24 kHz wave: a flow-matching DiT, a vocoder and the stream that joins them."""
