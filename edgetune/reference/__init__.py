"""Stored outputs (log-probabilities) of the base and the fine-tuned model. NumPy only."""
