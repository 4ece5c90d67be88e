"""Killed at any moment, an export leaves no file that looks finished and is not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetune_converters.provenance.receipts import Receipt
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import tiny
from tests.export_requests import export

# stands for a larger model: every block takes a while, so that a kill can strike anywhere between the renames too
_PROGRAM = """
import sys, time
from pathlib import Path
from tests.export_requests import export
from edgetune_converters.gguf import writer
replace = Path.replace
def slowly(self, target):
    time.sleep(0.01)
    return replace(self, target)
Path.replace = slowly
out = Path(sys.argv[2])
print("ready", flush=True)
receipts = export(
    Path(sys.argv[1]), {"q8_0": out / "a.gguf"}, safetensors={"bf16": out / "m"}, max_shard_size=200_000,
    onnx={"int4": out / "o"}, progress=lambda done, total: time.sleep(0.002), threads=1,
) + export(Path(sys.argv[1]), {"f32": out / "s.gguf"}, split_max_size=400_000, threads=1)
for receipt in receipts:
    receipt.write()
print("done", flush=True)
"""


def _killed(base: Path, out: Path, after: float | None) -> tuple[bool, float]:
    """Run the export and kill it so many seconds after it began, or never; whether it was over by then, and when."""
    with subprocess.Popen([sys.executable, "-c", _PROGRAM, str(base), str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        started = time.perf_counter()
        if after is not None:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        return process.stdout.read() == b"done\n", time.perf_counter() - started


def _check(out: Path, wanted: dict[str, bytes]) -> set[str]:
    """What lies there under a final name is whole; returns the names."""
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} if out.exists() else set()
    passing = (".partial", ".replaced", ".receipt.json")
    final = {name for name in found if not any(mark in name for mark in passing)}
    for name in final:
        assert (out / name).read_bytes() == wanted[name], name
    if any(name.startswith("m/") for name in final):
        assert Checkpoint(out / "m").tensors.keys() == Checkpoint(out.parent / "base").tensors.keys()
    first = any(name.startswith("s-00001-of-") for name in final)
    assert not first or {name for name in wanted if name.startswith("s-")} <= final, "a first part without the others"
    for name in found:
        if name.endswith(".receipt.json") and ".partial" not in name:
            Receipt.read(out / name.removesuffix(".receipt.json")).check()
    return final


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    whole = tmp_path / "whole"
    folders = {"bf16": whole / "m"}, {"int4": whole / "o"}
    export(base, {"q8_0": whole / "a.gguf"}, safetensors=folders[0], onnx=folders[1], max_shard_size=200_000)
    export(base, {"f32": whole / "s.gguf"}, split_max_size=400_000)
    wanted = {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    over, longest = _killed(base, tmp_path / "timed", None)
    assert over
    moments, outcomes, seen = random.Random(0), [], set()
    for round_ in range(18):
        out = tmp_path / f"out{round_ // 6}"  # one folder for several: what one leaves must not disturb the next
        outcomes.append(_killed(base, out, moments.uniform(0, longest))[0])
        seen.add(frozenset(_check(out, wanted)))
    assert not all(outcomes)
    assert len(seen) > 1, "the moments were all too early or too late"
    export(base, {"q8_0": out / "a.gguf"}, safetensors={"bf16": out / "n"}, max_shard_size=200_000)
    print(f"{outcomes.count(False)} of {len(outcomes)} killed, {len(seen)} different sets of files seen")


# Ctrl-C at the first rename of an output to its final name
_INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from tests.export_requests import export
rename, out = Path.replace, Path(sys.argv[2])
def interrupted(self, target):
    result = rename(self, target)
    if Path(target).name == "a.gguf":
        os.kill(os.getpid(), signal.SIGINT)
    return result
Path.replace = interrupted
outputs = {"q8_0": out / "a.gguf", "q4_0": out / "b.gguf"}
try:
    export(Path(sys.argv[1]), outputs, onnx={"int4": out / "o"}, threads=1, write_receipts=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_between_renames_leaves_receipts(tmp_path: Path) -> None:
    base, out = tiny.base("llama", tmp_path / "base"), tmp_path / "out"
    program = [sys.executable, "-c", _INTERRUPTED, str(base), str(out)]
    assert subprocess.run(program, check=False).returncode == 130
    made = {"a.gguf", "b.gguf", "o"}
    assert {path.name for path in out.iterdir()} == made | {f"{name}.receipt.json" for name in made}
    for name in made:
        Receipt.read(out / name).check()


# what the process does last: nothing after this call of the module `os` happens
_LAST = """
import os, signal, sys
from pathlib import Path
from tests.export_requests import export
name, half = sys.argv[3], sys.argv[4] == "half"
call = getattr(os, name)
def last(*arguments):
    if half:
        call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, name, last)
export(Path(sys.argv[1]), {"q8_0": Path(sys.argv[2]) / "a.gguf"}, threads=1)
"""


@pytest.mark.parametrize(("call", "how"), [("pwrite", "half"), ("pwrite", "not at all"), ("fsync", "not at all")])
def test_killed_while_the_header_is_completed(call: str, how: str, tmp_path: Path) -> None:
    """The hash of the base is written over its place in the header when all else is there, still under another name."""
    base, out = tiny.base("llama", tmp_path / "base"), tmp_path / "out"
    command = [sys.executable, "-c", _LAST, str(base), str(out), call, how]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == ["a.gguf.partial"]
    (receipt,) = export(base, {"q8_0": out / "a.gguf"})
    receipt.write()
    Receipt.read(out / "a.gguf").check()
    assert sorted(path.name for path in out.iterdir()) == ["a.gguf", "a.gguf.receipt.json"]
