"""What the commands that generate text share: options of sampling, writing an answer, rows of prompts and answers."""
