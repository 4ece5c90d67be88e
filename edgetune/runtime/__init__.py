"""Running exported files on the CPU: one interface, and the libraries behind it.

`load(path)` opens a file with whatever runs its format; nothing above this room asks which that is.
"""

from __future__ import annotations

from edgetune.runtime.interface import Completion, Finish, Generation, Runtime, RuntimeProblem, Sampling
from edgetune.runtime.loading import load

__all__ = ["Completion", "Finish", "Generation", "Runtime", "RuntimeProblem", "Sampling", "load"]
