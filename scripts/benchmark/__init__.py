"""What `scripts/bench` measures and what it compares with."""
