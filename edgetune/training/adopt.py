"""`edgetune adopt`: a run directory around an adapter that another program trained. Nothing is trained.

Preparation checks everything without torch and without weights. The capture of the reference can be killed at any time
and resumed.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune import console
from edgetune.adoption.prepare import PreparedAdoption, prepare_adoption
from edgetune.adoption.request import AdoptionRequest
from edgetune.data.preview import format_totals, format_unused
from edgetune.errors import DataError, RunDirectoryError
from edgetune.planning.disk import MARGIN, check_free_space, dequantized_bytes
from edgetune.planning.prepare import PreparedRun, warnings_of_held_out
from edgetune.planning.tokenizer_files import save_tokenizer
from edgetune.reference import store
from edgetune.reference.calibration import CalibrationRows
from edgetune.runs import lock
from edgetune.runs.directory import RunDirectory
from edgetune.runs.manifest import AdoptedFrom
from edgetune.runs.status import RunStatus, Stage
from edgetune.training import environment
from edgetune.training.resume import check_run_directory, existing_run_error, remove_run_files
from edgetune_converters.architectures import completed_config
from edgetune_converters.files import atomic
from edgetune_converters.files.contents import sha256_of

WRITER = "an adoption"
"""The name of the process in the run's lock."""
_PEFT_REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, KeyError)  # what PEFT raises for an adapter
_SHOWN = 3


def adopt(
    request: AdoptionRequest, out: Path | None = None, *, resume: bool = False, overwrite: bool = False
) -> RunDirectory:
    """Make a run directory around an adapter, capture its reference outputs, and return the finished run.

    Args:
        request: Adapter, base and rows.
        out: The run directory. Default: `runs/NAME`.
        resume: Resume an unfinished adoption of the same inputs.
        overwrite: Replace an existing run.

    Raises:
        EdgetuneError: For everything that the user can correct.
    """
    environment.require_train_extra()
    adoption = prepare_adoption(request)
    run = _run(adoption, out)
    check_run_directory(run, resume=resume, overwrite=overwrite)
    if resume and run.is_finished and _is_same(run, adoption):
        console.note(f"the run in {run.path} has finished already; there is nothing to resume")
        return run
    follows, _ = _check_before_loading(run, adoption)
    with lock.writing(run.path, WRITER):
        if not _can_resume(run, adoption, resume=resume, overwrite=overwrite):
            remove_run_files(run)
        with environment.silence_libraries():
            _write_inputs(run, adoption, names_fast_class=not follows)
            _load_and_capture(run, adoption)
        run.finish()
    return run


def dry_run(
    request: AdoptionRequest, out: Path | None = None, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Check everything that `adopt` checks before it loads weights. Write nothing and take no lock."""
    environment.require_train_extra()
    adoption = prepare_adoption(request)
    run = _run(adoption, out)
    existing = existing_run_error(run, resume=resume, overwrite=overwrite)
    if existing and run.status is RunStatus.FOREIGN:
        raise existing
    _, needed = _check_before_loading(run, adoption)
    if existing:
        hint = existing.hint or ""
        console.warn(f"{existing.message}; {hint[:1].lower()}{hint[1:]}")
    console.note(f"{run.path} will take about {needed / 2**20:.0f} MiB; nothing was written")


def _run(adoption: PreparedAdoption, out: Path | None) -> RunDirectory:
    return RunDirectory(Path("runs") / adoption.config.name if out is None else out)


def _is_same(run: RunDirectory, adoption: PreparedAdoption) -> bool:
    manifest = run.manifest
    return (
        manifest.adopted is not None
        and manifest.adopted.files == adoption.place.identity()
        and manifest.base.files == adoption.prepared.base.identity["files"]
        and manifest.data.get("rows") == adoption.data_identity["rows"]
        and _without_places(manifest.config) == _without_places(adoption.stored_config)
    )


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the paths, whose contents are compared."""
    data = {key: value for key, value in config["data"].items() if key not in ("train", "validation", "test")}
    return {**config, "base": None, "tokenizer": config.get("tokenizer") is not None, "data": data}


def _can_resume(run: RunDirectory, adoption: PreparedAdoption, *, resume: bool, overwrite: bool) -> bool:
    if not resume or not run.manifest_file.is_file():
        return False
    if _is_same(run, adoption):
        return True
    if overwrite:
        return False
    raise RunDirectoryError(
        f"the run in {run.path} was started with another adapter, base, rows or options",
        "Restore them, write elsewhere with -o, or start over with --overwrite",
    )


# -- before loading ----------------------------------------------------------------------------------------------------


def _check_before_loading(run: RunDirectory, adoption: PreparedAdoption) -> tuple[bool, int]:
    """Print the decisions and check disk space, tokenizer class and PEFT's names. Imports torch, loads no weights.

    Return whether transformers' tokenizer class follows tokenizer.json, and the disk space of the run in bytes.
    """
    prepared = adoption.prepared
    _print_overview(adoption)
    needed = _estimate_bytes(prepared, adoption)
    check_free_space(run.path, needed)
    with environment.silence_libraries():
        from edgetune.training import loading
        from edgetune.training.tokenizer_class import check_against_transformers

        loading.arithmetic(prepared.config)
        follows = check_against_transformers(prepared)
        # an adapter that PEFT alone merges needs the weights of the base to be made
        if not prepared.config.trust_remote_code and adoption.form.adapter is not None:
            model = loading.load_empty_model(prepared.base, prepared.config)
            _check_names(adoption, model)
    return follows, needed


def _print_overview(adoption: PreparedAdoption) -> None:
    prepared, arguments, reasons = adoption.prepared, adoption.arguments, adoption.reasons
    config = prepared.config
    files = ", ".join(path.name for path in arguments.files)
    read = f"; its arguments are those in {files}" if files else ""
    console.note(f"adapter {adoption.place.path}: {config.adapter.title}, trained by {arguments.trainer}{read}")
    base = prepared.base
    for note in [*adoption.notes, *base.notes, *base.layers.notes, *adoption.form.notes, *prepared.splits.notes]:
        console.note(note)
    console.note(f"base in the reference: {_bits(prepared)}, as {reasons.precision}")
    console.note(f"merge base {config.export.merge_base}: {reasons.merge_base}")
    console.note(reasons.tokenizer)
    if adoption.log.source:
        console.note(f"training log: {len(adoption.log.lines)} lines of {adoption.log.source.name}")
    console.note(f"held out: {format_totals(prepared.validation)}")
    for line in (*prepared.trailing.describe(), *format_unused(prepared.usage)):
        console.note(line)
    for warning in [*adoption.warnings, *warnings_of_held_out(prepared)]:
        console.warn(warning)
    if adoption.has_training_rows and prepared.duplicated_held_out:
        console.warn(
            f"{prepared.duplicated_held_out} held-out rows are in data.train too: figures look better than they are"
        )


def _bits(prepared: PreparedRun) -> str:
    quantization = prepared.config.quantization
    if quantization.bits == 16:
        return "as it is stored"
    double = ", double quantization" if quantization.double_quant else ""
    return f"4 bits ({quantization.type}{double})" if quantization.bits == 4 else "8 bits"


def _estimate_bytes(prepared: PreparedRun, adoption: PreparedAdoption) -> int:
    """Estimate the disk space of the run: adapter, reference, and the dequantized base while it is loaded."""
    checkpoint, reference = prepared.base.checkpoint, prepared.config.reference
    vocabulary = completed_config(checkpoint.config).vocab_size
    per_position = 2 * vocabulary if vocabulary <= reference.full_vocabulary_limit else 8 * reference.top_k
    positions = sum(len(row.scored) for row in prepared.reference_rows)
    adapter = 2 * sum(file.stat().st_size for file in adoption.place.weights)
    return adapter + positions * (per_position + 16) + dequantized_bytes(checkpoint) + MARGIN


def _check_names(adoption: PreparedAdoption, model: Any) -> None:
    """Raise DataError unless PEFT makes of adapter_config.json the tensors that the adapter has, in their shapes."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import safe_open

    if adoption.config.adapter.virtual_tokens:
        return
    with tempfile.TemporaryDirectory(prefix="edgetune-adopt-") as folder:
        adoption.form.write(Path(folder))
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            try:
                made = get_peft_model(model, PeftConfig.from_pretrained(folder))
            except _PEFT_REFUSALS as error:
                raise _refused_by_peft(adoption, error) from error
            wanted = {name: tuple(each.shape) for name, each in get_peft_model_state_dict(made).items()}
        with safe_open(Path(folder) / "adapter_model.safetensors", "numpy") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    _compare(adoption, sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys()))
    differing = [
        f"{name} {list(found[name])} and not {list(wanted[name])}" for name in found if found[name] != wanted[name]
    ]
    if differing:
        raise DataError(
            f"tensors of the adapter have other shapes than PEFT makes for this base: {'; '.join(differing[:_SHOWN])}",
            "Was it trained on this base model?",
        )


def _refused_by_peft(adoption: PreparedAdoption, error: Exception) -> DataError:
    return DataError(
        f"PEFT cannot load {adoption.place.path}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
        "Save it again with the version of PEFT that trained it, or update PEFT",
    )


def _compare(adoption: PreparedAdoption, unexpected: Sequence[str], missing: Sequence[str]) -> None:
    """Raise DataError for tensors that PEFT would ignore, or that it would fill with first values."""
    beside = adoption.prepared.base.layers.is_beside_text
    for names, what in (
        ([name for name in unexpected if not beside(name.removeprefix("base_model.model."))], "would not be used"),
        (missing, "are missing, and would have first values"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise DataError(
                f"{len(names)} tensors of the adapter {what} by PEFT: {', '.join(names[:_SHOWN])}{more}",
                "Save it again with PEFT: PeftModel.from_pretrained(BASE, DIR).save_pretrained(DIR)",
            )


# -- the run -----------------------------------------------------------------------------------------------------------


def _write_inputs(run: RunDirectory, adoption: PreparedAdoption, *, names_fast_class: bool) -> None:
    """Write manifest, tokenizer, adapter and log; from here on the adoption can be resumed."""
    prepared, arguments = adoption.prepared, adoption.arguments
    RunDirectory.create(run.path)
    config = adoption.stored_config
    run.update_manifest(
        config=config,
        base=dict(prepared.base.identity),
        data=adoption.data_identity,
        versions=environment.installed_versions(),
        device=environment.describe_device(),
        adopted=AdoptedFrom(
            path=str(adoption.place.path.resolve()),
            trainer=arguments.trainer,
            files=adoption.place.identity(),
            arguments=[str(path) for path in arguments.files],
            reasons=vars(adoption.reasons),
            options=arguments.other_options,
        ),
    )
    save_tokenizer(prepared.base.directory, prepared.template, run.tokenizer, names_fast_class=names_fast_class)
    with atomic.temporary_directory(run.adapter) as folder:
        adoption.form.write(folder)
        atomic.replace_directory(folder, run.adapter)
    if adoption.log.lines:
        run.logs.mkdir(exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in adoption.log.lines)
        atomic.write_text(run.metrics_file, text)


def _load_and_capture(run: RunDirectory, adoption: PreparedAdoption) -> None:
    from edgetune.training import adapters, bnb_record
    from edgetune.training.adapters.virtual_tokens import with_task
    from edgetune.training.capture.reference import capture_reference
    from edgetune.training.loading import load_model
    from edgetune.training.run import store_ngrams, translate_torch_errors

    prepared = adoption.prepared
    with translate_torch_errors(run.path):
        model = load_model(prepared.base, prepared.config, run.base)
        run.update_manifest(quantized=bnb_record.record_quantized_weights(model))
        try:
            model = with_task(adapters.load_adapter(model, run.adapter), prepared.config)
        except _PEFT_REFUSALS as error:
            raise _refused_by_peft(adoption, error) from error
        _check_loaded(run, adoption, model)
        run.record_stage(Stage.TRAIN, _results(run, adoption, model))
        capture_reference(run, prepared, model)
        if adoption.has_training_rows:
            store_ngrams(run, prepared)
            CalibrationRows.choose(prepared.train.rows).write(run.calibration)


def _check_loaded(run: RunDirectory, adoption: PreparedAdoption, model: Any) -> None:
    """Raise DataError unless PEFT has used every tensor of the adapter."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or adoption.config.adapter.virtual_tokens:
        return
    loaded = model.load_adapter(str(run.adapter), model.active_adapter)
    _compare(adoption, sorted(loaded.unexpected_keys), sorted(loaded.missing_keys))


def _results(run: RunDirectory, adoption: PreparedAdoption, model: Any) -> dict[str, Any]:
    """Return the results of the stage `train`, as far as its log tells them."""
    prepared = adoption.prepared
    text_of = prepared.tokenizer.text_of
    rows = {"validation": prepared.validation.summary()}
    if adoption.has_training_rows:
        rows = {"train": prepared.train.summary(), **rows}
    return {
        **adoption.log.results,
        "trainable_parameters": _count_parameters(model),
        "rows": rows,
        "pad_token": text_of(prepared.pad_id),
        "stop_tokens": [text_of(id_) for id_ in sorted(prepared.stop_ids)],
        "adapter": {path.name: sha256_of(path) for path in sorted(run.adapter.iterdir())},
    }


def _count_parameters(model: Any) -> int:
    from peft import get_peft_model_state_dict

    return sum(each.numel() for each in get_peft_model_state_dict(model).values())


def format_summary(run: RunDirectory) -> str:
    """Return what was adopted as lines for standard output."""
    manifest, captured = run.manifest, store.summary(run)
    assert manifest.adopted is not None
    entropy, trained = captured.cross_entropy, run.train_results
    lines = [
        f"run         {run.path}",
        f"adapter     {manifest.adopted.path}, trained by {manifest.adopted.trainer}",
        f"merge base  {manifest.config['export']['merge_base']}: {manifest.adopted.reasons['merge_base']}",
        f"held out    {captured.rows} rows, perplexity {math.exp(entropy['base']):.3f} (base) -> "
        f"{math.exp(entropy['trained']):.3f} (trained)",
    ]
    if trained.steps and not math.isnan(trained.loss_last):
        lines.insert(2, f"training    {trained.steps} steps, loss {trained.loss_first:.4f} -> {trained.loss_last:.4f}")
    task = captured.task
    if task:
        lines.append(f"task        {task['rows']} rows, {task['base']:.1%} (base) -> {task['trained']:.1%} (trained)")
    if entropy["trained"] >= entropy["base"]:
        lines.append(
            "warning     the adapter makes the held-out rows less likely than the base alone does: are base, template "
            "and rows those of the training?"
        )
    return "\n".join([*lines, f"next        edgetune merge-export {shlex.quote(str(run.path))}"])
