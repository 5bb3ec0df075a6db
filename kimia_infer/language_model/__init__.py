"""The dual-track language model: one trunk, a MIMO branch, two heads and their decode loop."""
