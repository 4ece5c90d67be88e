"""Evaluate a trained model and exported files on the tasks of lm-evaluation-harness, with the same prompts."""
