"""The stream of merged tensors, in blocks of rows, and the merge base."""
