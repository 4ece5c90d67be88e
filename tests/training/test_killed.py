"""`edgetune train` killed in mid-training and resumed, and Ctrl-C within `merge-export`.

A killed process runs no handler: what it left on the disk is all that the next one has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune import cli
from edgetune.runs.directory import RunDirectory
from edgetune.training import checkpoints
from edgetune_converters.files.contents import sha256_of
from tests.training import runs
from tests.training.objectives import encoded

pytestmark = pytest.mark.slow

KILLED, SAVED = 5, 3
# name -> adapter, objective
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-pro": ({"kind": "llama-pro"}, {"kind": "sft"}),
    "trainable tokens": ({"kind": "trainable-tokens", "new_tokens": ["<lamp>"]}, {"kind": "sft"}),
    "KTO": ({"r": 4}, {"kind": "kto"}),
    "distillation": ({"r": 4}, {"kind": "distillation"}),
    "DoRA": ({"r": 4, "use_dora": True, "dropout": 0.1}, {"kind": "sft"}),
    "prompt tuning": ({"kind": "prompt-tuning", "tokens": 4}, {"kind": "sft"}),
}
# sends a signal to its own process when step 5 is over, and runs the command line
_TRAIN = """
import os, signal, sys
from edgetune import cli
from edgetune.training.callbacks import MetricsCallback
stepped = MetricsCallback._stepped
def acting(self, at, last, logs):
    stepped(self, at, last, logs)
    if at == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
MetricsCallback._stepped = acting
sys.exit(cli.run(sys.argv[2:]))
"""
# sends Ctrl-C to its own process at a call of a function, and runs the command line
_INTERRUPT = """
import importlib, os, signal, sys
from edgetune import cli
module, name, call = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
*classes, name = name.split(".")
for each in classes:
    owner = getattr(owner, each)
function, calls = getattr(owner, name), []
def acting(*arguments, **named):
    calls.append(None)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGINT)
    return function(*arguments, **named)
setattr(owner, name, acting)
code = cli.run(sys.argv[4:])
print("calls", len(calls), file=sys.stderr)
sys.exit(code)
"""


def python(program: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


def edgetune(*words: Any) -> int:
    """Run a command in a process with as many threads as the killed one had: sums depend on their number."""
    return python("import sys; from edgetune import cli; sys.exit(cli.run(sys.argv[1:]))", *words).returncode


def write_config(name: str, base: Path, folder: Path) -> Path:
    adapter, objective = CASES[name]
    steps = {"max_steps": 8, "save_steps": SAVED, "eval_steps": 4}
    if objective["kind"] == "sft":
        values = runs.settings(base, folder, **steps)
    else:
        teacher = {"teacher": str(base)} if objective["kind"] == "distillation" else {}
        values = encoded.settings(base, folder, objective | teacher, **steps)
    values["adapter"] = adapter
    values["export"] = {"types": ["q8_0"]}
    return runs.write_config(folder / "config.yaml", values)


def digests(run: RunDirectory) -> dict[str, str]:
    files = [*run.adapter.iterdir(), *run.reference.iterdir()]
    return {path.name: sha256_of(path) for path in files if path.name != "reference.json"}


def files_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_in_mid_training_resumes_to_the_same_adapter(name: str, base: Path, tmp_path: Path) -> None:
    config = write_config(name, base, tmp_path)
    whole, killed = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "killed")
    assert edgetune("train", config, "-o", whole.path) == 0
    result = python(_TRAIN, KILLED, "train", config, "-o", killed.path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not killed.is_finished
    assert [checkpoints.step_of(each) for each in checkpoints.list_complete(killed.checkpoints)] == [SAVED]
    assert edgetune("train", config, "-o", killed.path, "--resume") == 0
    assert digests(killed) == digests(whole)
    assert not whole.train_results.adapter_is_zero
    stop_an_export(whole, tmp_path / "out")


def stop_an_export(run: RunDirectory, out: Path) -> None:
    """Ctrl-C at any block leaves nothing, not even the folder, and the run as it was."""
    before = files_in(run.path)
    export = ("merge-export", run.path, "-o", out / "model.gguf")
    for call in (1, 4):
        stopped = python(_INTERRUPT, "edgetune_converters.merging.stream", "_Source.block", call, *export)
        assert stopped.returncode == 130, stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert not list(out.rglob("*")) if out.exists() else True
        assert files_in(run.path) == before
    assert cli.run([str(word) for word in export]) == 0
