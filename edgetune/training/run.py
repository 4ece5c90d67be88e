"""The stages of `edgetune train`: prepare -> train -> reference; each leaves its results behind.

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
from edgetune.config import ALL_LINEAR, Config
from edgetune.errors import EnvironmentProblem
from edgetune.planning.disk import check_free_space, estimate_run_bytes
from edgetune.planning.prepare import PreparedRun, prepare_run, print_overview
from edgetune.planning.tokenizer_files import save_tokenizer
from edgetune.reference import store
from edgetune.runs import lock
from edgetune.runs.directory import RunDirectory
from edgetune.training import environment
from edgetune.training import resume as state

FULL = 2**24
"""Fewer free bytes than this are taken for a full disk."""


def train(config: Config, path: Path, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
    """Fine-tune and capture the reference; returns the finished run directory.

    Raises Stopped when the user interrupted training, and edgetune's errors for everything that can be mended.
    """
    run = RunDirectory(path)
    state.check_run_directory(run, resume=resume, overwrite=overwrite)
    plan = prepare_run(config)
    identity = plan.base.identity()
    holds = resume and run.is_finished and state.is_up_to_date(run, plan, identity, overwrite=overwrite)
    if holds and state.is_reference_up_to_date(run, config):
        with lock.writing(path, "a training"):
            state.adopt_free_sections(run, config)
        return run
    environment.require_train_extra()
    print_overview(plan)
    check_free_space(path, estimate_run_bytes(config, plan.base.checkpoint, plan.reference_rows))
    _check_targets(plan)
    with lock.writing(path, "a training"):
        if holds and run.is_finished:
            run.reopen()
        state.check_run_directory(run, resume=resume and not run.is_finished, overwrite=overwrite)  # as it is by now
        if not state.can_resume(run, config, identity, plan.data_identity, resume=resume, overwrite=overwrite):
            state.remove_run_files(run)
        with environment.silence_libraries():
            _begin(run, plan, identity)
            _run_stages(run, plan)
        run.finish()
    return run


def _check_targets(plan: PreparedRun) -> None:
    """ConfigError when layers that are named are not there. Imports torch, but loads no weights."""
    if plan.config.adapter.target_modules == ALL_LINEAR:
        return
    with environment.silence_libraries():
        from edgetune.training import loading
        from edgetune.training.adapters import lora

        lora.add_adapter(loading.load_empty_model(plan.base, plan.config), plan.config.adapter)


def _run_stages(run: RunDirectory, plan: PreparedRun) -> None:
    """The stages that need torch, which is imported here."""
    import torch
    from safetensors import SafetensorError

    from edgetune.training.capture.reference import capture_reference
    from edgetune.training.fit import train_or_load_adapter

    try:
        capture_reference(run, plan, train_or_load_adapter(run, plan))
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


def dry_run(config: Config, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Everything that `train` checks before it loads weights; torch is imported for layers that are named only."""
    state.check_run_directory(RunDirectory(path), resume=resume, overwrite=overwrite)
    environment.require_train_extra()
    plan = prepare_run(config)
    print_overview(plan)
    needed = estimate_run_bytes(config, plan.base.checkpoint, plan.reference_rows)
    check_free_space(path, needed)
    _check_targets(plan)
    console.note(f"{path} will take about {needed / 2**20:.0f} MiB; nothing was written")


def _begin(run: RunDirectory, plan: PreparedRun, identity: Mapping[str, Any]) -> None:
    """Write the manifest and the tokenizer: from here on --resume knows what to go on with."""
    RunDirectory.create(run.path)
    device = environment.describe_device()
    if device["type"] == "cpu" and plan.config.training.optimizer.startswith("paged"):
        console.note("no CUDA GPU: training on the CPU, where the paged optimizer's state is not paged")
    run.update_manifest(
        config=plan.config.model_dump(mode="json"),
        base=dict(identity),
        data=plan.data_identity,
        versions=environment.installed_versions(),
        device=device,
    )
    save_tokenizer(plan.base.path, plan.template.source, run.tokenizer)


def format_summary(run: RunDirectory) -> str:
    """What came out, for standard output."""
    trained, said = run.train_results, store.summary(run)
    entropy = said["cross_entropy"]
    lines = [
        f"run         {run.path}",
        f"training    {trained.steps} steps in {trained.seconds:.0f} s, "
        f"loss {trained.loss_first:.4f} -> {trained.loss_last:.4f}, evaluation loss {trained.eval_loss:.4f}",
        f"held out    {said['rows']} rows, perplexity {math.exp(entropy['base']):.3f} (base) -> "
        f"{math.exp(entropy['trained']):.3f} (trained)",
    ]
    task = said["task"]
    if task:
        lines.append(f"task        {task['rows']} rows, {task['base']:.1%} (base) -> {task['trained']:.1%} (trained)")
    if trained.adapter_is_zero:
        lines.append(
            "warning     the adapter is all zero: training has changed nothing, and merge-export will refuse it; "
            "train for more steps, or raise training.learning_rate"
        )
        return "\n".join(lines)
    return "\n".join([*lines, f"next        edgetune merge-export {shlex.quote(str(run.path))}"])
