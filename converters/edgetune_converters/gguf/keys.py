"""Metadata keys of our own that more than one room reads."""

NORMALIZER = "edgetune.tokenizer.normalizer"
"""Unicode normal form (NFC, ...) of the tokenizer of training; llama.cpp itself does not normalize."""

SPACE = "edgetune.tokenizer.space"
"""Where a space goes before a text (first, each) or is taken away (spare), which llama.cpp itself does otherwise."""

LSTRIP = "edgetune.tokenizer.lstrip"
"""Texts of added tokens that eat the white space before them; llama.cpp knows no such thing."""

RSTRIP = "edgetune.tokenizer.rstrip"
"""Texts of added tokens that eat the white space after them."""
