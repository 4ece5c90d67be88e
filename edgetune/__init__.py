"""edgetune: fine-tune with QLoRA, export to GGUF, run on a CPU, and prove that the file is what was trained."""

__version__ = "0.1.0"
