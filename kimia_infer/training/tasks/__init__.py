"""Training of the codec: speech tokenizer, detokenizer and vocoder."""
