"""`edgetune plan`: what a training and its files will take on this machine, with the reason for each figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgetune.benchmarking.memory import cache_size, measure_memory
from edgetune.config import Config
from edgetune.planning.artifact_figures import cache_figures, file_figures, planned_files, speed_figures
from edgetune.planning.card import CardSection, Figure, PlanCard
from edgetune.planning.disk import MARGIN, count_adapter_parameters, dequantized_bytes, estimate_run_bytes
from edgetune.planning.memory import Arithmetic, TrainingLayout, choose_layout, estimate_memory
from edgetune.planning.prepare import PreparedRun, prepare_run
from edgetune.planning.target import parse_target, propose
from edgetune.runtime.threads import physical_cores
from edgetune.training import environment
from edgetune.training.processor import free_memory

EVALUATED = 1 / 3
"""Time of a row in an evaluation as a share of that in training: the forward pass of forward and backward."""
_LIBRARIES = "torch, transformers and CUDA take more: 0.5 to 1.5 GiB"


def make_plan(config: Config, *, target: str | None = None, probe: bool = True) -> PlanCard:
    """Return the card of a training. Loads two layers of the base at most, and writes nothing that is kept.

    Args:
        config: The configuration.
        target: A machine whose memory the proposal has to fit, such as `8GB laptop`.
        probe: Whether to measure the time of steps and the bandwidth of memory.

    Raises:
        EdgetuneError: As `prepare_run`; ConfigError if nothing fits the target.
    """
    memory = None if target is None else parse_target(target)
    environment.require_train_extra()
    prepared = prepare_run(config)
    with environment.silence_libraries():
        trained, device, follows = _trained_parameters(prepared)
        layout = choose_layout(prepared, trained, device, free_memory())
        files = planned_files(prepared.base, config)
        speed = measure_memory(physical_cores()) if probe else None
        sections = [
            *_memory_sections(prepared, trained, device, layout),
            CardSection("disk of the run", tuple(_disk(prepared))),
            CardSection("time on this device", tuple(_time(prepared, layout, probe=probe))),
            CardSection("exported files", tuple(file_figures(files))),
            CardSection("key-value cache of a file", tuple(cache_figures(prepared.base))),
        ]
    if speed is not None:
        figures = speed_figures(files, speed.bandwidth, speed.threads, cache_size())
        sections.append(CardSection("decoding on this CPU", tuple(figures)))
    proposal = None if memory is None else propose(prepared, trained, device, files, memory)
    return PlanCard(
        tuple(sections),
        tuple(_checks(prepared, follows=follows)),
        {} if proposal is None else proposal.settings,
        () if proposal is None else proposal.reasons,
    )


def _trained_parameters(prepared: PreparedRun) -> tuple[int, Arithmetic, bool]:
    """Return the number of trained parameters, the device, and whether transformers' tokenizer follows."""
    from edgetune.training import adapters, loading
    from edgetune.training.tokenizer_class import check_against_transformers

    config = prepared.config
    device = loading.arithmetic(config)
    follows = check_against_transformers(prepared)
    if config.trust_remote_code and not config.adapter.names_layers:
        return count_adapter_parameters(prepared.base.checkpoint, config.adapter), device, follows
    model = loading.load_empty_model(prepared.base, config)
    adapted = adapters.add_adapter(model, config.adapter, prepared.base.layers, config.export.formats)
    adapters.check_head(adapted, config.objective)
    return adapters.count_trainable(adapted), device, follows


def _memory_sections(
    prepared: PreparedRun, trained: int, device: Arithmetic, layout: TrainingLayout
) -> Iterator[CardSection]:
    """Yield the memory of the training as it would be here, and its sum with the other checkpointing."""
    estimate = estimate_memory(prepared, trained, device, layout=layout)
    other = not layout.checkpointing
    beside = estimate_memory(prepared, trained, device, layout=replace(layout, checkpointing=other))
    reasons = _reasons(prepared, trained, layout)
    figures = [Figure(part.name, part.bytes, "bytes", reasons.get(part.name, "")) for part in estimate.parts]
    figures.append(Figure("all", estimate.total, "bytes", f"at the peak; {_LIBRARIES}"))
    switch = f"gradient_checkpointing: {str(other).lower()}"
    how = "recomputed" if other else "stored"
    figures.append(Figure(f"all with {switch}", beside.total, "bytes", f"the same with activations {how}"))
    yield CardSection("memory of the GPU in training" if device.is_gpu else "memory in training", tuple(figures))


def _reasons(prepared: PreparedRun, trained: int, layout: TrainingLayout) -> dict[str, str]:
    config = prepared.config
    training = config.training
    longest = f"{training.batch_size} rows of up to {prepared.train.longest} tokens"
    bits = config.quantization.bits
    return {
        "weights": f"the base in {bits} bits" if bits != 16 else "the base as it is stored",
        "adapter": f"{trained:,} parameters in f32",
        "gradients": "f32, for what is trained",
        "optimizer": training.optimizer,
        "activations": f"{longest}, {'recomputed' if layout.checkpointing else 'stored'} layer by layer",
        "logits and loss": longest,
        "dequantized weights": "kept, in place of dequantizing them two or three times a step",
    }


def _disk(prepared: PreparedRun) -> Iterator[Figure]:
    checkpoint = prepared.base.checkpoint
    total = estimate_run_bytes(prepared.config, checkpoint, prepared.reference_rows)
    keeps = prepared.config.training.keep_checkpoints
    yield Figure(
        "run directory", total, "bytes",
        f"adapter, {keeps} checkpoints and one that is written, reference of {len(prepared.reference_rows)} rows, "
        f"{MARGIN // 2**20} MiB for logs",
    )  # fmt: skip
    if packed := dequantized_bytes(checkpoint):
        yield Figure("of it while loading", packed, "bytes", "the dequantized weights of the base")


def _time(prepared: PreparedRun, layout: TrainingLayout, *, probe: bool) -> Iterator[Figure]:
    """Yield the time of the training, measured on one and two layers."""
    from edgetune.training.time_probe import probe_time, why_not_probed

    why = why_not_probed(prepared) if probe else "not measured (--no-probe)"
    yield Figure("steps", prepared.steps, "count", _steps_reason(prepared))
    if why is not None:
        yield Figure("training", None, "seconds", why)
        return
    found = probe_time(prepared, layout)
    training = prepared.config.training
    rows = prepared.steps * training.batching.rows_of_step
    evaluations = prepared.steps // training.eval_steps + 1
    evaluated = evaluations * len(prepared.validation.rows) * EVALUATED
    yield Figure(
        "training", found.seconds(rows), "seconds",
        f"{rows:,} rows x {1000 * found.row:,.0f} ms: {1000 * found.first:,.0f} ms with one layer, and "
        f"{1000 * found.layer:,.1f} ms for each of {found.layers - 1} more, measured in steps of {found.batch} rows",
    )  # fmt: skip
    reason = f"{evaluations} on {len(prepared.validation.rows)} held-out rows, a third of the time of training on them"
    yield Figure("evaluations", found.seconds(evaluated), "seconds", reason)


def _steps_reason(prepared: PreparedRun) -> str:
    training = prepared.config.training
    if training.max_steps is not None:
        return "training.max_steps"
    return f"{training.epochs:g} epochs of {prepared.train.examples:,} rows, {training.batching.rows_of_step} a step"


def _checks(prepared: PreparedRun, *, follows: bool) -> Iterator[str]:
    """Yield what `prepare_run` and transformers have checked."""
    base = prepared.base
    formats = ", ".join(prepared.config.export.formats) or "gguf"
    yield f"architecture {base.layers.family.name}: every tensor has a place in {formats}"
    yield (
        "tokenizer: converts, and transformers gives the same ids"
        if follows
        else ("tokenizer: converts; transformers' class gives other ids, and the run names one that follows")
    )
    yield f"chat template: {len(prepared.contract)} conversations render as in transformers"
    train, held_out = prepared.train, prepared.validation
    yield f"rows: {len(train.rows):,} to train on, {len(held_out.rows):,} held out, longest {train.longest} tokens"
