"""What goes with a published file: model card, Ollama Modelfile."""
