"""Making checkpoints: so far the untrained miniature."""
