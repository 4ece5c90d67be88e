"""GGUF version 3: what is written, and the reader that checks it."""

from edgetune_converters.gguf.reader import GgufFile, TensorEntry, read

__all__ = ["GgufFile", "TensorEntry", "read"]
