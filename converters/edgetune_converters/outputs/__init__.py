"""The outputs that one pass can write: GGUF, safetensors, ONNX, a GGUF adapter."""
