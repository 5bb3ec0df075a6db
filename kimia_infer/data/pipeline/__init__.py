"""Long recordings to training data: who speaks when, what is said, and what of it is good."""
