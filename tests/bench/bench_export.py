"""Base and adapter to GGUF: edgetune against PEFT's merge, convert_hf_to_gguf.py and llama-quantize's function.

    python -m tests.bench.bench_export [--rounds N] [--peer-rounds N] [--cases LIST] [--warm] [--large]

A random model of Llama-3.2-1B's shape (1.24 billion weights) with an r=16 adapter on all linear layers, each step in a
process of its own, ours and theirs in turn. llama.cpp's converter comes from the source distribution of the pinned
llama-cpp-python, which pip fetches into build/bench once; quantization is llama_model_quantize of the installed
library, with as many threads. Peak memory is the largest of a side's processes, written is what lies on the disk after.

Before either side the system is told to forget the files of base and adapter, so both read them from the disk; with
--warm both are read once beforehand instead. What theirs writes and reads again stays in the cache. Files of the round
before are removed before the clock starts. --large measures ours alone, on a model of four times as many weights too:
its memory must not grow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tests.bench.models import LLAMA_1B, LLAMA_5B, Shape, write_adapter, write_llama
from tests.bench.processes import Cost, run, size

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
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outtype", sys.argv[4], "--outfile", sys.argv[3]]
convert_hf_to_gguf.main()
"""

QUANTIZE = """
import sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""


class Case(NamedTuple):
    """What is asked of both sides."""

    type: str
    adapter: bool = True


CASES = {
    "q4_k_m": Case("q4_k_m"),
    "q8_0": Case("q8_0"),
    "f16": Case("f16"),
    "base-q4_k_m": Case("q4_k_m", adapter=False),
    "base-q8_0": Case("q8_0", adapter=False),
}


@dataclass(frozen=True)
class Model:
    """A base and its adapter on the disk."""

    base: Path
    adapter: Path

    def prepare(self, warm: bool) -> None:
        """Bring its files into the system's cache, or out of it."""
        for path in (*self.base.iterdir(), *self.adapter.iterdir()):
            with path.open("rb") as file:
                if warm:
                    while file.read(1 << 22):
                        pass
                else:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _ours(model: Model, case: Case, *types: str, formats: str = "gguf") -> Cost:
    out = HERE / "ours"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "edgetune", "merge-export", "--base", str(model.base), "--format", formats]
    command += ["--adapter", str(model.adapter)] if case.adapter else []
    return replace(run([*command, "-q", ",".join((case.type, *types)), "-o", str(out)]), written=size(out))


def _theirs(model: Model, case: Case, source: Path) -> Cost:
    out = HERE / "theirs"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    merged, whole, file = out / "merged", out / "whole.gguf", out / "quantized.gguf"
    threads = str(len(os.sched_getaffinity(0)))
    mixed = case.type == "q4_k_m"
    kind = "bf16" if mixed else case.type
    steps: list[Sequence[str]] = []
    steps += [(MERGE, str(model.base), str(model.adapter), str(merged))] if case.adapter else []
    steps.append((CONVERT, str(source), str(merged if case.adapter else model.base), str(whole), kind))
    steps += [(QUANTIZE, str(whole), str(file), threads)] if mixed else []
    costs = [run([sys.executable, "-c", *step]) for step in steps]
    print("  theirs: " + " + ".join(f"{cost.seconds:.1f} ({cost.processor:.1f})" for cost in costs) + " s", flush=True)
    seconds, processor = sum(cost.seconds for cost in costs), sum(cost.processor for cost in costs)
    return Cost(seconds, processor, max(cost.peak for cost in costs), size(out))


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
    return run([sys.executable, "-c", "import edgetune.cli, edgetune_converters.exporting"]).peak


def _model(name: str, shape: Shape, shard: int | None = None) -> Model:
    model = Model(HERE / f"base-{name}", HERE / f"adapter-{name}")
    if not (model.base / "config.json").exists():
        write_llama(model.base, shape, shard)
    if not model.adapter.exists():
        write_adapter(model.adapter, model.base, shape)
    return model


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="of ours")
    parser.add_argument("--peer-rounds", type=int, default=1, help="of theirs, in the first rounds; it takes minutes")
    parser.add_argument("--cases", default="q4_k_m", help=f"of {', '.join(CASES)}")
    parser.add_argument("--warm", action="store_true", help="base and adapter are in the system's cache")
    parser.add_argument("--large", action="store_true", help="memory of ours with 1.24 and 5.05 billion weights")
    options = parser.parse_args()
    HERE.mkdir(parents=True, exist_ok=True)
    small = _model("1b", LLAMA_1B)
    if options.large:
        _compare_sizes(small, _model("5b", LLAMA_5B, shard=2 * 10**9))
        return
    source = _source().resolve()
    for name in options.cases.split(","):
        _compare_sides(name, small, source, options)
    _note_imports()


def _compare_sides(name: str, model: Model, source: Path, options: argparse.Namespace) -> None:
    case, ours, theirs = CASES[name], [], []
    for number in range(options.rounds):
        model.prepare(options.warm)
        ours.append(_ours(model, case))
        print(f"  ours: {ours[-1].seconds:.1f} s ({ours[-1].processor:.1f} of processor)", flush=True)
        if number < options.peer_rounds:
            model.prepare(options.warm)
            theirs.append(_theirs(model, case, source))
    print(f"{name}, {'warm' if options.warm else 'cold'}: median of {len(ours)} and of {len(theirs)}")
    for what, unit, scale, value in ROWS:
        one, other = _median(ours, value) / scale, (_median(theirs, value) / scale if theirs else float("nan"))
        print(f"{what + ', ' + unit:20}{one:10.1f}{other:10.1f}   x{other / one:.1f}")


def _compare_sizes(small: Model, large: Model) -> None:
    """Peak memory, which must not depend on the size of the model, for one output and for several."""
    requests = (("gguf", ("q4_k_m",)), ("gguf", ("q4_k_m", "q8_0")), ("safetensors,gguf-lora", ("bf16",)))
    print(f"{'peak memory, MB':40}{'1.24 B':>10}{'5.05 B':>10}{'seconds':>18}")
    for formats, (first, *rest) in requests:
        costs = [_ours(model, Case(first), *rest, formats=formats) for model in (small, large)]
        peaks = "".join(f"{cost.peak / 1e6:10.0f}" for cost in costs)
        print(f"{formats + ' ' + ','.join((first, *rest)):40}{peaks}{costs[0].seconds:10.1f}{costs[1].seconds:8.1f}")
    shutil.rmtree(HERE / "ours")
    _note_imports()


def _note_imports() -> None:
    print(f"of our peak memory {_import_memory() / 1e6:.0f} MB are there after the imports")


ROWS: tuple[tuple[str, str, float, Callable[[Cost], float]], ...] = (
    ("wall time", "s", 1, lambda cost: cost.seconds),
    ("processor time", "s", 1, lambda cost: cost.processor),
    ("peak memory", "MB", 1e6, lambda cost: cost.peak),
    ("written", "MB", 1e6, lambda cost: cost.written),
)


def _median(costs: Sequence[Cost], value: Callable[[Cost], float]) -> float:
    return statistics.median(map(value, costs))


if __name__ == "__main__":
    main()
