"""The stage that trains: model, adapter and trainer put together; interrupted and resumed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, set_seed

from edgetune import console
from edgetune.planning.prepare import PreparedRun
from edgetune.runs.directory import RunDirectory
from edgetune.runs.status import Stage
from edgetune.training import bnb_record, checkpoints
from edgetune.training.adapters import lora
from edgetune.training.callbacks import CheckpointCallback, InterruptCallback, MetricsCallback
from edgetune.training.loading import load_model, load_tokenizer
from edgetune.training.resume import TrainingInterrupted
from edgetune.training.trainer import Collator, Trainer, build_trainer
from edgetune_converters.files.contents import sha256_of


def train_or_load_adapter(run: RunDirectory, plan: PreparedRun) -> Any:
    """The base with its adapter: trained now, from the last complete checkpoint on, or loaded if that was done before.

    Raises Stopped after Ctrl-C.
    """
    done = run.manifest.stages.train
    set_seed(plan.config.training.seed)
    model = load_model(plan.base, plan.config)
    run.update_manifest(quantized=bnb_record.record_quantized_weights(model))
    if done:
        console.note("the adapter is trained already")
        return lora.load_adapter(model, run.adapter)
    stop = InterruptCallback()
    metrics = MetricsCallback(run, plan.config.training.logging_steps)
    trainer = _trainer(run, plan, lora.add_adapter(model, plan.config.adapter), metrics, stop)
    started = time.perf_counter()
    try:
        _fit(trainer, run, metrics, stop)
    finally:
        metrics.close()
    _save_adapter(trainer, run)
    seconds = round(time.perf_counter() - started, 1)
    files = {path.name: sha256_of(path) for path in sorted(run.adapter.iterdir())}
    run.record_stage(Stage.TRAIN, {**_results(trainer, plan, metrics), "seconds": seconds, "adapter": files})
    # Trainer leaves its autocast wrapped around the forward, even in evaluation; capture chooses its own type.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _trainer(
    run: RunDirectory, plan: PreparedRun, model: Any, metrics: MetricsCallback, stop: InterruptCallback
) -> Trainer:
    config = plan.config
    tokenizer, _ = load_tokenizer(plan.base, config)
    tokenizer.pad_token_id = plan.pad_id  # as far as TRL is concerned; the files stay as they are
    callbacks = [metrics, CheckpointCallback(config.training.keep_checkpoints), stop]
    collator = Collator(plan.pad_id, plan.stop_ids)
    trainer = build_trainer(
        model, tokenizer, plan.train.rows, plan.validation.rows, collator, config, run.checkpoints, callbacks
    )
    console.note(f"training {lora.count_trainable(trainer.model):,} parameters; {plan.pad_reason}")
    return trainer


def _fit(trainer: Trainer, run: RunDirectory, metrics: MetricsCallback, stop: InterruptCallback) -> None:
    checkpoints.delete_incomplete(run.checkpoints)
    last = checkpoints.latest_complete(run.checkpoints)
    if last is not None:
        console.note(f"resuming after step {checkpoints.step_of(last)}")
    if last is not None and _load_if_last(trainer, last):
        metrics.take_up(trainer.state)
    else:
        with stop.installed():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingInterrupted(trainer.state.global_step)
    if trainer.state.global_step not in metrics.evaluations:
        trainer.evaluate()


def _load_if_last(trainer: Trainer, checkpoint: Path) -> bool:
    """Load the checkpoint if it is that of the last step; resumed from there, Trainer would run one step too many."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def _results(trainer: Trainer, plan: PreparedRun, metrics: MetricsCallback) -> dict[str, Any]:
    """What the manifest records of the stage."""
    step = trainer.state.global_step
    name = plan.tokenizer.text_of
    return {
        "steps": step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "loss_first": metrics.losses[0],
        "loss_last": float(np.mean(metrics.losses[-metrics.window :])),
        "eval_loss": metrics.evaluations[step],
        "tokens_per_second": round(metrics.tokens_per_second, 1),
        "trainable_parameters": lora.count_trainable(trainer.model),
        "adapter_is_zero": lora.is_adapter_zero(trainer.model),
        "rows": {"train": plan.train.summary(), "validation": plan.validation.summary()},
        "pad_token": name(plan.pad_id),
        "stop_tokens": [name(id_) for id_ in sorted(plan.stop_ids)],
    }


def _save_adapter(trainer: Trainer, run: RunDirectory) -> None:
    """The adapter as PEFT writes it, published by a rename."""
    partial = run.adapter.with_name("adapter.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.save_pretrained(str(partial), save_embedding_layers=False)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's model card, all placeholders
    shutil.rmtree(run.adapter, ignore_errors=True)
    partial.replace(run.adapter)
