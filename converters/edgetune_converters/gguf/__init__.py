"""GGUF version 3: writer, and a reader that checks files before they are used."""

from edgetune_converters.gguf.reader import GgufFile, TensorEntry, read

__all__ = ["GgufFile", "TensorEntry", "read"]
