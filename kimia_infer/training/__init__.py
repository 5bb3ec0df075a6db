"""Making checkpoints: training data, fine-tuning, and the untrained miniature."""
