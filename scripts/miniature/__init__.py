"""The miniature: a small spoken world, what is trained on it, and how it is scored."""
