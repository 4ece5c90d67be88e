"""edgetune_native beside what it replaces: libggml, numpy, bitsandbytes and ONNX Runtime, one table each.

python -m tests.bench.bench_native
"""

from __future__ import annotations

from tests.bench.bench_bitsandbytes import bench_bitsandbytes
from tests.bench.bench_logits import bench_compare
from tests.bench.bench_nbits import bench_nbits
from tests.bench.bench_quantize import bench_quantize


def main() -> None:
    """Print all tables."""
    for bench in (bench_quantize, bench_compare, bench_bitsandbytes, bench_nbits):
        bench()
        print()


if __name__ == "__main__":
    main()
