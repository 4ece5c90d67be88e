"""QLoRA training and the capture of reference outputs: the only package that imports torch.

`run`, `resume`, `checkpoints` and `environment` import torch only inside functions, so that a problem of the base, the
data or the disk is reported at once. `run.train` is the entry point, for the command line and for Python.
"""
