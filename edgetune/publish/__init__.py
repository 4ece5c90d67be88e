"""Documents for published files: the model card and the Ollama Modelfile."""
