"""Quantized checkpoints: their weights as ordinary tensors, decoded by rows on demand; a module per method."""
