"""Lazy, memory-mapped reading of base checkpoints: safetensors, quantized checkpoints, GGUF."""
