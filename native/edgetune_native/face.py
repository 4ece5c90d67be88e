"""The checked face over the kernels. `Face` holds one implementation; the package exports the methods of one `Face`.

Everything that could go wrong with an argument is found here, before a byte is written, and said with the value found
and the value expected. ValueError: a wrong value, length or shape. TypeError: a wrong type of array or number.
"""

from __future__ import annotations

from .faces.bitsandbytes import BitsandbytesFace
from .faces.logits import LogitsFace
from .faces.machine import MachineFace
from .faces.nbits import NBitsFace
from .faces.product import ProductFace
from .faces.weights import WeightsFace


class Face(WeightsFace, ProductFace, NBitsFace, BitsandbytesFace, LogitsFace, MachineFace):
    """The functions of the package over one implementation of the kernels."""
