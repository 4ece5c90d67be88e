"""QLoRA training and the capture of what the trained model says: the only room with torch.

`base`, `environment`, `planning` and `checkpoints` do their work without importing torch, so that what is wrong with a
base, a dataset or the disk is said at once.
"""
