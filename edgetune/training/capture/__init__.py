"""Capture the outputs of the base and the fine-tuned model on held-out rows."""
