"""Making checkpoints: what a training sample predicts, and the untrained miniature."""
