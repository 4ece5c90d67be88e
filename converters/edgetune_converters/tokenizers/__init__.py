"""Convert a Hugging Face tokenizer to a GGUF vocabulary and verify it by token ids."""
