"""Storage types of GGUF tensors: number in the file, weights per block, bytes per block.

Source of the numbers: `GGMLQuantizationType` and `GGML_QUANT_SIZES` of the gguf package. A test compares them;
importing that package would take a tenth of a second.
"""

from __future__ import annotations

from typing import NamedTuple


class StorageType(NamedTuple):
    """A storage type: `block` weights take `bytes` bytes."""

    name: str
    id: int
    block: int
    bytes: int

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of `width` weights, a multiple of `block`."""
        return width // self.block * self.bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return self.bytes * 8 / self.block


_ALL = (
    StorageType("f32", 0, 1, 4),
    StorageType("f16", 1, 1, 2),
    StorageType("q4_0", 2, 32, 18),
    StorageType("q4_1", 3, 32, 20),
    StorageType("q5_0", 6, 32, 22),
    StorageType("q5_1", 7, 32, 24),
    StorageType("q8_0", 8, 32, 34),
    StorageType("q8_1", 9, 32, 40),
    StorageType("q2_k", 10, 256, 84),
    StorageType("q3_k", 11, 256, 110),
    StorageType("q4_k", 12, 256, 144),
    StorageType("q5_k", 13, 256, 176),
    StorageType("q6_k", 14, 256, 210),
    StorageType("q8_k", 15, 256, 292),
    StorageType("iq2_xxs", 16, 256, 66),
    StorageType("iq2_xs", 17, 256, 74),
    StorageType("iq3_xxs", 18, 256, 98),
    StorageType("iq1_s", 19, 256, 50),
    StorageType("iq4_nl", 20, 32, 18),
    StorageType("iq3_s", 21, 256, 110),
    StorageType("iq2_s", 22, 256, 82),
    StorageType("iq4_xs", 23, 256, 136),
    StorageType("i8", 24, 1, 1),
    StorageType("i16", 25, 1, 2),
    StorageType("i32", 26, 1, 4),
    StorageType("i64", 27, 1, 8),
    StorageType("f64", 28, 1, 8),
    StorageType("iq1_m", 29, 256, 56),
    StorageType("bf16", 30, 1, 2),
    StorageType("tq1_0", 34, 256, 54),
    StorageType("tq2_0", 35, 256, 66),
    StorageType("mxfp4", 39, 32, 17),
    StorageType("nvfp4", 40, 64, 36),
    StorageType("q1_0", 41, 128, 18),
    StorageType("q2_0", 42, 64, 18),
)

BY_NAME = {storage.name: storage for storage in _ALL}
BY_ID = {storage.id: storage for storage in _ALL}
