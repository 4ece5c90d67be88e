"""A training from its configuration to the finished run directory: prepare, train, capture the reference.

Preparation checks everything that can be wrong, without torch. The stages after it can be killed at any time and
resumed.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import console
from edgetune.config import Config, load_config
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.planning.disk import check_free_space, count_adapter_parameters, estimate_run_bytes
from edgetune.planning.memory import TrainingLayout, choose_layout, describe_layout, describe_memory, estimate_memory
from edgetune.planning.prepare import PreparedRun, prepare_run, print_overview
from edgetune.planning.teacher import check_teacher, with_teacher_answers
from edgetune.planning.tokenizer_files import save_tokenizer
from edgetune.reference import store
from edgetune.reference.calibration import CalibrationRows
from edgetune.reference.reward_scores import RewardScores
from edgetune.runs import lock
from edgetune.runs.directory import RunDirectory
from edgetune.runs.status import RunStatus
from edgetune.runtime.ngrams import Answers, NgramTable
from edgetune.training import environment
from edgetune.training.processor import free_memory
from edgetune.training.resume import (
    adopt_free_sections,
    can_resume,
    check_run_directory,
    existing_run_error,
    is_reference_up_to_date,
    is_up_to_date,
    remove_run_files,
)
from edgetune_converters.files.writable import why_not_writable
from edgetune_converters.names import NF4

FULL_DISK = 2**24
"""A disk with fewer free bytes is taken for a full one."""
WRITER = "a training"
"""The name of the process in the run's lock."""


def train(
    config: Config | Path | str,
    out: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> RunDirectory:
    """Fine-tune a base model, capture its reference outputs, and return the finished run directory.

    Args:
        config: The configuration, or the path of its YAML file.
        out: The run directory. Default: `runs/NAME`.
        overrides: `key=value` settings that replace those of a YAML file.
        resume: Resume an unfinished run from its last checkpoint; keep a finished run whose inputs are the same.
        overwrite: Replace an existing run; with `resume`, only if its inputs have changed.

    Raises:
        TrainingInterrupted: After Ctrl-C, when a checkpoint has been saved.
        EdgetuneError: For everything that the user can correct.
    """
    config, run = _open(config, out, overrides)
    check_run_directory(run, resume=resume, overwrite=overwrite)
    rendered_at = run.manifest.rendered_at if resume and run.manifest_file.is_file() else None
    prepared = prepare_run(config, rendered_at)
    trained = resume and run.is_finished and is_up_to_date(run, prepared, overwrite=overwrite)
    if trained and is_reference_up_to_date(run, prepared):
        with lock.writing(run.path, WRITER):
            adopt_free_sections(run, config)
        return run
    environment.require_train_extra()
    checked = _check_before_loading(run, prepared)
    with lock.writing(run.path, WRITER):
        if trained and run.is_finished:
            run.reopen()
        # another process may have changed the directory before the lock was taken
        check_run_directory(run, resume=resume and not run.is_finished, overwrite=overwrite)
        if not can_resume(run, prepared, resume=resume, overwrite=overwrite):
            remove_run_files(run)
            if prepared.rendered_at and rendered_at:  # the time of the run that is replaced
                prepared = prepare_run(config)
        with environment.silence_libraries():
            _write_inputs(run, prepared, names_fast_class=not checked.follows)
            _train_and_capture(run, prepared, checked.layout)
        run.finish()
    return run


def dry_run(
    config: Config | Path | str,
    out: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Check everything that `train` checks before it loads weights. Write nothing and take no lock.

    A run that exists already is a warning here, since nothing is written.
    """
    config, run = _open(config, out, overrides)
    existing = existing_run_error(run, resume=resume, overwrite=overwrite)
    if existing and run.status is RunStatus.FOREIGN:
        raise existing
    environment.require_train_extra()
    prepared = prepare_run(config, run.manifest.rendered_at if resume and run.manifest_file.is_file() else None)
    needed = _check_before_loading(run, prepared).disk
    if existing:
        hint = existing.hint or ""
        console.warn(f"{existing.message}; {hint[:1].lower()}{hint[1:]}")
    console.note(f"{run.path} will take about {needed / 2**20:.0f} MiB; nothing was written")


def _open(config: Config | Path | str, out: Path | str | None, overrides: Sequence[str]) -> tuple[Config, RunDirectory]:
    if not isinstance(config, Config):
        config = load_config(Path(config), overrides)
    return config, RunDirectory(Path("runs") / config.name if out is None else Path(out))


@dataclass(frozen=True)
class _Checked:
    """What the checks before loading have found."""

    disk: int
    """Disk space of the run in bytes."""
    follows: bool
    """Whether transformers' tokenizer class follows tokenizer.json."""
    layout: TrainingLayout
    """What the training keeps in memory."""


def _check_before_loading(run: RunDirectory, prepared: PreparedRun) -> _Checked:
    """Print the overview and check disk space, tokenizer class and target layers. Imports torch, loads no weights."""
    print_overview(prepared)
    check_teacher(prepared, run.teacher_answers)
    needed = estimate_run_bytes(prepared.config, prepared.base.checkpoint, prepared.reference_rows)
    check_free_space(run.path, needed)
    with environment.silence_libraries():
        from edgetune.training import adapters, loading
        from edgetune.training.tokenizer_class import check_against_transformers

        arithmetic = loading.arithmetic(prepared.config)
        follows = check_against_transformers(prepared)
        trained = count_adapter_parameters(prepared.base.checkpoint, prepared.config.adapter)
        # a base's own Python code may not be written for a model without weights
        if not prepared.config.trust_remote_code or prepared.config.adapter.names_layers:
            model = loading.load_empty_model(prepared.base, prepared.config)
            if prepared.config.export.merge_base == NF4 and not adapters.has_rounded_layers(model):
                raise ConfigError(
                    "export.merge_base is nf4, and bitsandbytes rounds no layer of this base to 4 bits",
                    "Set export.merge_base: original",
                )
            formats = prepared.config.export.formats
            adapted = adapters.add_adapter(model, prepared.config.adapter, prepared.base.layers, formats)
            adapters.check_head(adapted, prepared.config.objective)
            adapters.check_saved_modules(adapted, prepared.config.quantization.bits)
            if "gguf" in formats:
                adapters.check_gguf_head(adapted, prepared.config.adapter, prepared.base.layers)
            if "gguf-lora" in formats:
                adapters.check_lora_places(adapted, prepared.base.layers)
            trained = adapters.count_trainable(adapted)
    free = free_memory()
    layout = choose_layout(prepared, trained, arithmetic, free)
    estimate = estimate_memory(prepared, trained, arithmetic, layout=layout)
    console.note(describe_memory(estimate, prepared.config.objective))
    if chosen := describe_layout(layout, prepared.config, free):
        console.note(chosen)
    return _Checked(needed, follows, layout)


def _write_inputs(run: RunDirectory, prepared: PreparedRun, *, names_fast_class: bool) -> None:
    """Write manifest and tokenizer; from here on the run can be resumed."""
    RunDirectory.create(run.path)
    device = environment.describe_device()
    if device["type"] == "cpu" and prepared.config.training.optimizer.startswith("paged"):
        console.note("no CUDA GPU: training on the CPU, where the paged optimizer's state is not paged")
    if prepared.config.quantization.compute_dtype == "bfloat16" and environment.emulates_bfloat16():
        console.note("this CPU has no bfloat16 instructions: computing in float32, which is about ten times as fast")
    if prepared.config.quantization.bits == 8:
        console.note(
            "training on the base in 8 bits; an export merges the change into the original weights, and `edgetune "
            "validate` measures the difference"
        )
    run.update_manifest(
        config=prepared.config.model_dump(mode="json"),
        base=dict(prepared.base.identity),
        data=prepared.data_identity,
        versions=environment.installed_versions(),
        device=device,
    )
    save_tokenizer(prepared.base.directory, prepared.template, run.tokenizer, names_fast_class=names_fast_class)


def _train_and_capture(run: RunDirectory, prepared: PreparedRun, layout: TrainingLayout) -> None:
    """Run the two stages that need torch, which is imported here."""
    from edgetune.training.capture.reference import capture_reference
    from edgetune.training.fit import train_or_load_adapter

    prepared = with_teacher_answers(prepared, run.teacher_answers)
    with translate_torch_errors(run.path):
        model = train_or_load_adapter(run, prepared, layout)
        capture_reference(run, prepared, model)
        store_ngrams(run, prepared)
        CalibrationRows.choose(prepared.train.rows).write(run.calibration)
        if prepared.config.objective.facts.is_scorer:
            _store_scores(run, prepared, model)


def store_ngrams(run: RunDirectory, prepared: PreparedRun) -> None:
    """Store what exported files guess ahead with."""
    table = NgramTable.count(Answers.of(prepared.train.rows))
    if table is not None and not prepared.config.objective.facts.is_scorer:
        table.write(run.ngrams)


def _store_scores(run: RunDirectory, prepared: PreparedRun, model: Any) -> None:
    """Store the scores that a reward model gives held-out pairs; its files are compared with them."""
    import torch

    from edgetune.training.capture import generate
    from edgetune.training.objectives.reward import score_pairs

    _, precision = generate.capture_precision(model, prepared.config)
    with torch.inference_mode(), precision():
        pairs = score_pairs(prepared, model, run.score_head, prepared.config.reference.rows)
    RewardScores(pairs=pairs).write(run.scores_file)


@contextmanager
def translate_torch_errors(path: Path) -> Iterator[None]:
    """Turn a GPU without memory and a full disk into errors that say what to do."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise EnvironmentProblem(
            "the GPU ran out of memory",
            "Lower training.batch_size (and raise gradient_accumulation), training.max_length or adapter.r",
        ) from None
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        why = why_not_writable(path)
        if why is None and shutil.disk_usage(path).free > FULL_DISK:
            raise
        if why is not None and "no space" not in why:
            raise EnvironmentProblem(
                f"{path} cannot be written any more: {why}",
                "Make it writable, then resume from the last checkpoint with --resume",
            ) from None
        raise EnvironmentProblem(
            f"no space is left on the disk of {path} ({str(error).splitlines()[0]})",
            "Free some space, then resume from the last checkpoint with --resume",
        ) from None


def format_summary(run: RunDirectory) -> str:
    """Return the results of a finished run as lines for standard output."""
    trained, captured = run.train_results, store.summary(run)
    entropy = captured.cross_entropy
    lines = [
        f"run         {run.path}",
        f"training    {trained.steps} steps in {trained.seconds:.0f} s, "
        f"loss {trained.loss_first:.4f} -> {trained.loss_last:.4f}, evaluation loss {trained.eval_loss:.4f}",
        f"held out    {captured.rows} rows, perplexity {math.exp(entropy['base']):.3f} (base) -> "
        f"{math.exp(entropy['trained']):.3f} (trained)",
    ]
    if trained.metrics:
        figures = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in trained.metrics.items())
        lines.insert(2, f"metrics     {', '.join(figures)}")
    task = captured.task
    if task:
        lines.append(f"task        {task['rows']} rows, {task['base']:.1%} (base) -> {task['trained']:.1%} (trained)")
    if trained.adapter_is_zero:
        lines.append(
            "warning     the adapter is all zero: training has changed nothing, and merge-export will refuse it; "
            "train for more steps, or raise training.learning_rate"
        )
        return "\n".join(lines)
    return "\n".join([*lines, f"next        edgetune merge-export {shlex.quote(str(run.path))}"])
