"""The training stage: model, adapter and trainer put together, run to the end, and resumed after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, set_seed

from edgetune import console
from edgetune.methods.adalora import AdaLora
from edgetune.planning.memory import TrainingLayout, layouts
from edgetune.planning.prepare import PreparedRun
from edgetune.runs.directory import RunDirectory
from edgetune.runs.status import Stage
from edgetune.training import adapters, bnb_record, checkpoints, micro_batches
from edgetune.training.adapters.virtual_tokens import start_from_text, with_task
from edgetune.training.batch_watch import BatchWatch
from edgetune.training.callbacks import (
    CheckpointCallback,
    InterruptCallback,
    MetricsCallback,
    Stopwatch,
    TrainingDiverged,
)
from edgetune.training.loading import compute_dtype, load_model, load_tokenizer
from edgetune.training.objectives import TrainerInputs, build_trainer
from edgetune.training.processor import keep_pages
from edgetune.training.resident import keep_resident
from edgetune.training.resume import TrainingInterrupted
from edgetune_converters.files import atomic
from edgetune_converters.files.contents import sha256_of


def train_or_load_adapter(run: RunDirectory, prepared: PreparedRun, layout: TrainingLayout | None = None) -> Any:
    """Return the base with its trained adapter.

    The adapter is loaded if it has been trained already; otherwise it is trained, from the last complete checkpoint on.
    Out of memory, the micro-batches become smaller. Raises TrainingInterrupted after Ctrl-C.

    Args:
        run: The run directory.
        prepared: The training.
        layout: What it keeps in memory; None: as little as the configuration allows.
    """
    layout = layouts(prepared.config)[-1] if layout is None else layout
    keep_pages()
    while True:
        try:
            return _load_and_train(run, prepared, layout)
        except micro_batches.StepOutOfMemory as stop:
            prepared, layout = micro_batches.shrink(prepared, layout, stop.error)
        micro_batches.free_memory()  # outside the handler, whose traceback holds the model


def _load_and_train(run: RunDirectory, prepared: PreparedRun, layout: TrainingLayout) -> Any:
    set_seed(prepared.config.training.seed)
    model = load_model(prepared.base, prepared.config, run.base)
    run.update_manifest(quantized=bnb_record.record_quantized_weights(model))
    if layout.resident and not keep_resident(model, compute_dtype(prepared.config)):
        console.note("the weights are dequantized at each use: kept, they would give other results on this device")
    if run.manifest.stages.train:
        console.note("the adapter is trained already")
        return with_task(adapters.load_adapter(model, run.adapter), prepared.config)
    adapted = _add_adapter(run, prepared, model)
    try:
        return _train(run, prepared, adapted, layout)
    except micro_batches.OUT_OF_MEMORY as error:
        if micro_batches.is_out_of_memory(error):
            raise micro_batches.StepOutOfMemory(error) from None
        raise


def _add_adapter(run: RunDirectory, prepared: PreparedRun, model: Any) -> Any:
    config = prepared.config
    unquantized = config.model_copy(update={"quantization": config.quantization.model_copy(update={"bits": 16})})
    sources = adapters.StartSources(
        lambda: [row.input_ids for row in prepared.train.rows],
        lambda: load_model(prepared.base, unquantized, run.base),
        lambda: [row.labels for row in prepared.train.rows],
    )
    adapted = adapters.add_adapter(model, config.adapter, prepared.base.layers, config.export.formats, sources)
    start_from_text(adapted, config.adapter, prepared.tokenizer)
    return with_task(adapted, config)


def _train(run: RunDirectory, prepared: PreparedRun, model: Any, layout: TrainingLayout) -> Any:
    """Train the adapter, store it with the results of the stage, and return the model without Trainer's wrappers."""
    config = prepared.config
    metrics = MetricsCallback(run, config.training.logging_steps, config.objective.facts.metrics)
    interrupt = InterruptCallback()
    last = _resumed_checkpoint(run)
    stopwatch = Stopwatch(checkpoints.read_elapsed(last))
    saving = CheckpointCallback(config.training.keep_checkpoints, stopwatch)
    ranks = [adapters.RankCallback(model, config.adapter)] if isinstance(config.adapter, AdaLora) else []
    trainer = _build(
        TrainerInputs(
            model, load_tokenizer(prepared), prepared, run.checkpoints, [metrics, *ranks, saving, interrupt], layout
        )
    )
    start = adapters.start_of(trainer.model, config.adapter)
    before = adapters.fingerprint_trainable(trainer.model)
    watch = BatchWatch()
    watch.attach(trainer)
    try:
        _run_trainer(trainer, last, metrics, interrupt)
    except TrainingDiverged as error:
        raise _with_batch(error, watch, run, trainer) from None
    finally:
        metrics.close()
    if config.objective.facts.is_scorer:
        trainer.save_score_head(run.score_head)
    _save_adapter(trainer, run, start)
    unchanged = adapters.fingerprint_trainable(trainer.model) == before
    results = _results(trainer, prepared, metrics, stopwatch, run.adapter)
    run.record_stage(Stage.TRAIN, results | {"adapter_is_zero": unchanged} | _smaller_batch(run, prepared))
    # Trainer leaves its autocast wrapped around the forward, even in evaluation; capture chooses its own type.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _smaller_batch(run: RunDirectory, prepared: PreparedRun) -> dict[str, int]:
    """Return the micro-batch that had memory, where it is not the configured one."""
    used = prepared.config.training.batch_size
    return {} if used == run.manifest.config["training"]["batch_size"] else {"micro_batch": used}


def _with_batch(error: TrainingDiverged, watch: BatchWatch, run: RunDirectory, trainer: Any) -> TrainingDiverged:
    """Save the batch of the step that diverged, and return the error with its place."""
    path = run.logs / f"diverged-step-{trainer.state.global_step}.jsonl"
    count = watch.save(path, trainer.processing_class)
    if not count:
        return error
    return TrainingDiverged(error.message, f"{error.hint}; the {count} rows of that step are in {path}")


def _resumed_checkpoint(run: RunDirectory) -> Path | None:
    """Return the last complete checkpoint, after deleting incomplete ones."""
    checkpoints.delete_incomplete(run.checkpoints)
    last = checkpoints.latest_complete(run.checkpoints)
    if last is not None:
        console.note(f"resuming after step {checkpoints.step_of(last)}")
    return last


def _build(inputs: TrainerInputs) -> Any:
    prepared, trainer = inputs.prepared, build_trainer(inputs)
    adapters.set_optimizer(trainer, prepared.config.adapter)
    console.note(f"training {adapters.count_trainable(trainer.model):,} parameters; {prepared.pad_reason}")
    return trainer


def _run_trainer(trainer: Any, last: Path | None, metrics: MetricsCallback, interrupt: InterruptCallback) -> None:
    """Train from the checkpoint `last` on, if there is one, and evaluate after the last step."""
    if last is not None and _load_if_final(trainer, last):
        metrics.restore(trainer.state)
    else:
        with interrupt.listening():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if interrupt.requested:
        raise TrainingInterrupted(trainer.state.global_step)
    if trainer.state.global_step not in metrics.evaluations:
        trainer.evaluate()


def _load_if_final(trainer: Any, checkpoint: Path) -> bool:
    """Load the checkpoint if it is that of the last step; resumed from there, Trainer would run one step too many."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def _save_adapter(trainer: Any, run: RunDirectory, start: adapters.Start | None) -> None:
    """Save the adapter in PEFT's format; the finished directory is renamed into place.

    `start`: first values that have been taken out of the base; the saved adapter fits the base as it is on the disk.
    """
    with atomic.temporary_directory(run.adapter) as folder:
        trainer.model.save_pretrained(str(folder), save_embedding_layers=False)
        if start is not None:
            adapters.convert_stored(folder, start)
        adapters.sort_stored_names(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, which holds only placeholders
        atomic.replace_directory(folder, run.adapter)


def _results(
    trainer: Any, prepared: PreparedRun, metrics: MetricsCallback, stopwatch: Stopwatch, adapter: Path
) -> dict[str, Any]:
    """Return the results of the stage for the manifest."""
    step = trainer.state.global_step
    text_of = prepared.tokenizer.text_of
    return {
        "steps": step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "loss_first": metrics.losses[0],
        "loss_last": float(np.mean(metrics.losses[-metrics.window :])),
        "eval_loss": metrics.evaluations[step],
        "tokens_per_second": round(metrics.tokens_per_second, 1),
        "trainable_parameters": adapters.count_trainable(trainer.model),
        "rows": {"train": prepared.train.summary(), "validation": prepared.validation.summary()},
        "pad_token": text_of(prepared.pad_id),
        "stop_tokens": [text_of(id_) for id_ in sorted(prepared.stop_ids)],
        "seconds": round(stopwatch.seconds, 1),
        **({"metrics": metrics.evaluated} if metrics.evaluated else {}),
        "adapter": {path.name: sha256_of(path) for path in sorted(adapter.iterdir())},
    }
