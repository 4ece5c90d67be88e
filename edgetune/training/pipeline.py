"""The stages of `edgetune train`: prepare -> train -> reference; each leaves its results in the manifest.

`prepare` finds and checks everything that can be wrong, without torch; the stages after it can be killed at any time
and taken up again.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune import console
from edgetune.config import Config
from edgetune.errors import EnvironmentProblem
from edgetune.run_directory import RunDirectory
from edgetune.training import environment, state
from edgetune.training.plan import Plan, describe, prepare
from edgetune.training.planning import bytes_needed, check_disk

FULL = 2**24
"""Fewer free bytes than this are taken for a full disk."""


def train(config: Config, path: Path, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
    """Fine-tune and capture the reference; returns the finished run directory.

    Raises Stopped when the user interrupted training, and edgetune's errors for everything that can be mended.
    """
    run = RunDirectory(path)
    state.check_state(run, resume=resume, overwrite=overwrite)
    if run.is_finished and not overwrite:
        state.check_same_options(run, config)
        console.note(f"the run in {path} has finished already; there is nothing to resume")
        return run
    environment.require_train_extra()
    plan = prepare(config)
    describe(plan)
    check_disk(path, bytes_needed(config, plan.base.checkpoint, plan.reference_rows))
    identity = plan.base.identity()
    if not state.goes_on(run, config, identity, plan.splits.identity, resume=resume, overwrite=overwrite):
        state.clear(run)
    with environment.quiet():
        _begin(run, plan, identity)
        _run_stages(run, plan)
    run.finish()
    return run


def _run_stages(run: RunDirectory, plan: Plan) -> None:
    """The stages that need torch, which is imported here."""
    import torch
    from safetensors import SafetensorError

    from edgetune.training.capture import capture
    from edgetune.training.fitting import trained_model

    try:
        capture(run, plan, trained_model(run, plan))
    except torch.OutOfMemoryError:
        raise EnvironmentProblem(
            "the GPU ran out of memory",
            "Lower training.batch_size (and raise gradient_accumulation), training.max_length or adapter.r.",
        ) from None
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        if shutil.disk_usage(run.path).free > FULL:
            raise
        raise EnvironmentProblem(
            f"no space is left on the disk of {run.path} ({str(error).splitlines()[0]})",
            "Free some space; --resume then goes on from the last checkpoint.",
        ) from None


def check(config: Config, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Everything that `train` checks before it imports torch, and nothing else."""
    state.check_state(RunDirectory(path), resume=resume, overwrite=overwrite)
    environment.require_train_extra()
    plan = prepare(config)
    describe(plan)
    needed = bytes_needed(config, plan.base.checkpoint, plan.reference_rows)
    check_disk(path, needed)
    console.note(f"{path} will take about {needed / 2**20:.0f} MiB; nothing was written")


def _begin(run: RunDirectory, plan: Plan, identity: Mapping[str, Any]) -> None:
    """Write the manifest and the tokenizer: from here on --resume knows what to go on with."""
    RunDirectory.create(run.path)
    device = environment.device()
    if device["type"] == "cpu" and plan.config.training.optimizer.startswith("paged"):
        console.note("no CUDA GPU: training on the CPU, where the paged optimizer's state is not paged")
    run.update_manifest(
        config=plan.config.model_dump(mode="json"),
        base=dict(identity),
        data={**plan.splits.identity, "formats": plan.splits.formats},
        versions=environment.versions(),
        device=device,
    )
    run.save_tokenizer(plan.base.path, plan.template.source)


def summary(run: RunDirectory) -> str:
    """What came out, for standard output."""
    trained, reference = run.stage("train"), run.stage("reference")
    entropy = reference["cross_entropy"]
    lines = [
        f"run         {run.path}",
        f"training    {trained['steps']} steps in {trained['seconds']:.0f} s, "
        f"loss {trained['loss_first']:.4f} -> {trained['loss_last']:.4f}, evaluation loss {trained['eval_loss']:.4f}",
        f"held out    {reference['rows']} rows, perplexity {math.exp(entropy['base']):.3f} (base) -> "
        f"{math.exp(entropy['trained']):.3f} (trained)",
    ]
    task = reference["task"]
    if task:
        lines.append(f"task        {task['rows']} rows, {task['base']:.1%} (base) -> {task['trained']:.1%} (trained)")
    return "\n".join([*lines, f"next        edgetune merge-export {shlex.quote(str(run.path))}"])
