"""Making checkpoints: training data, fine-tuning, and the miniature."""
