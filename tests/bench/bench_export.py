"""Base and adapter to Q4_K_M: edgetune against PEFT's merge, convert_hf_to_gguf.py and llama-quantize's function.

    python -m tests.bench.bench_export [--layers N] [--rounds N]

A random model of Llama-3.2-1B's shape (1.24 billion weights; fewer with --layers) with an r=16 adapter on all linear
layers, each step in a process of its own, ours and theirs in turn. llama.cpp's converter comes from the source
distribution of the pinned llama-cpp-python, which pip fetches into build/bench once; quantization is
llama_model_quantize of the installed library, with as many threads. Peak memory is the largest of a side's processes,
written is what lies on the disk after it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.models import write_adapter, write_llama

HERE = Path("build/bench")

MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, low_cpu_mem_usage=True)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""

# The converter knows pre-tokenizers by a hash over a text, which the benchmark's random vocabulary cannot have; and
# it wants sentencepiece installed before it looks for another kind of vocabulary.
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.llama
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
conversion.llama.LlamaModel.set_vocab = base.TextModel._set_vocab_gpt2
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outtype", "bf16", "--outfile", sys.argv[3]]
convert_hf_to_gguf.main()
"""

QUANTIZE = """
import sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""


@dataclass(frozen=True)
class Cost:
    """What one side took."""

    seconds: float
    peak: float
    """Bytes."""
    written: int


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak bytes of a child process."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command[:3])} failed:\n{errors.decode()[-2000:]}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024.0


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def _ours(base: Path, adapter: Path, out: Path) -> Cost:
    file = out / "model.gguf"
    command = [sys.executable, "-m", "edgetune", "merge-export", "--base", str(base), "--adapter", str(adapter)]
    seconds, peak = _run([*command, "-q", "q4_k_m", "-o", str(file), "--overwrite"])
    return Cost(seconds, peak, _size(file))


def _theirs(base: Path, adapter: Path, out: Path, source: Path) -> Cost:
    merged, whole, file = out / "merged", out / "bf16.gguf", out / "theirs.gguf"
    threads = str(len(os.sched_getaffinity(0)))
    steps = (
        (MERGE, str(base), str(adapter), str(merged)),
        (CONVERT, str(source), str(merged), str(whole)),
        (QUANTIZE, str(whole), str(file), threads),
    )
    costs = [_run([sys.executable, "-c", *step]) for step in steps]
    print("  theirs: " + " + ".join(f"{seconds:.1f}" for seconds, _ in costs) + " s", flush=True)
    cost = Cost(sum(c[0] for c in costs), max(c[1] for c in costs), sum(map(_size, (merged, whole, file))))
    shutil.rmtree(merged)
    whole.unlink()
    return cost


def _source() -> Path:
    """llama.cpp as the pinned llama-cpp-python distributes it."""
    pinned = version("llama-cpp-python")
    root = HERE / f"llama_cpp_python-{pinned}"
    if not root.is_dir():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]
        subprocess.run([*pip, f"llama-cpp-python=={pinned}", "-d", str(HERE)], check=True)
        with tarfile.open(next(HERE.glob(f"llama_cpp_python-{pinned}.tar.gz"))) as archive:
            archive.extractall(HERE, filter="data")
    return root / "vendor" / "llama.cpp"


def _import_memory() -> float:
    """Peak bytes of a process that imports the exporter and does nothing."""
    return _run([sys.executable, "-c", "import edgetune.cli, edgetune_converters.export"])[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    HERE.mkdir(parents=True, exist_ok=True)
    source, base = _source().resolve(), HERE / f"base-{options.layers}"
    adapter = HERE / f"adapter-{options.layers}"
    if not (base / "config.json").exists():
        write_llama(base, layers=options.layers)
        write_adapter(adapter, base, layers=options.layers)
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(_ours(base, adapter, HERE))
        theirs.append(_theirs(base, adapter, HERE, source))
    _print(ours, theirs)


def _print(ours: list[Cost], theirs: list[Cost]) -> None:
    rows: tuple[tuple[str, str, float, Any], ...] = (
        ("wall time", "s", 1, lambda cost: cost.seconds),
        ("peak memory", "MB", 1e6, lambda cost: cost.peak),
        ("written", "MB", 1e6, lambda cost: cost.written),
    )
    print(f"{'median of ' + str(len(ours)):20}{'ours':>10}{'theirs':>10}")
    for name, unit, scale, value in rows:
        one, other = (statistics.median(map(value, costs)) / scale for costs in (ours, theirs))
        print(f"{name + ', ' + unit:20}{one:10.1f}{other:10.1f}   x{other / one:.1f}")
    print(f"of our peak memory {_import_memory() / 1e6:.0f} MB are there after the imports")


if __name__ == "__main__":
    main()
