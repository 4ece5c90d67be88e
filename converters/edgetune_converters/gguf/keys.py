"""Metadata keys of our own that more than one room reads."""

NORMALIZER = "edgetune.tokenizer.normalizer"
"""Unicode normal form (NFC, ...) of the tokenizer of training; llama.cpp itself does not normalize."""
