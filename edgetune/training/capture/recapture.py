"""`edgetune reference`: recapture a finished run's reference, measure merged models, write a KLD base file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from edgetune import console
from edgetune.config import Config
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import ConfigError, DataError, RunDirectoryError
from edgetune.planning.base_model import Base
from edgetune.planning.prepare import PreparedRun, prepare_run
from edgetune.planning.teacher import with_teacher_answers
from edgetune.reference import merged
from edgetune.reference.codecs import StoredComparison
from edgetune.reference.llama_kld import KldBaseWriter, scored_positions, split_into_chunks, with_bos
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.training import adapters
from edgetune.training.adapters.virtual_tokens import with_task
from edgetune.training.capture import forward, generate
from edgetune.training.capture.long_rows import longest_context
from edgetune.training.capture.reference import capture_reference
from edgetune.training.loading import load_model
from edgetune.training.tokenizer_class import check_rendering
from edgetune_converters.exporting import export
from edgetune_converters.files.atomic import temporary_directory
from edgetune_converters.request import ExportRequest, Target


@dataclass(frozen=True)
class RecaptureRequest:
    """What to capture."""

    reference: bool
    """Recapture the reference."""
    merged: Mapping[str, ExportRequest] = field(default_factory=dict)
    """Merged models to measure: the merge base -> the request for its export."""
    llama_base: Path | None = None
    """Path of a base file for llama-perplexity --kl-divergence-base."""
    llama_context: int = 512
    """Tokens per chunk of the base file."""
    llama_text: Path | None = None
    """UTF-8 text that is split into chunks; None: the held-out rows."""


def recapture(run: RunDirectory, config: Config, request: RecaptureRequest) -> None:
    """Capture what is requested.

    Raises:
        RunDirectoryError: If the base is not the one that the run was trained on.
    """
    prepared = with_teacher_answers(prepare_run(config, run.manifest.rendered_at, trains=False), run.teacher_answers)
    check_base(run, prepared.base)
    if request.reference:
        check_rendering(prepared)
    model = None
    if request.reference or request.llama_base:
        model = with_task(adapters.load_adapter(load_model(prepared.base, config, run.base), run.adapter), config)
        generate.prepare_for_capture(model)
    if request.reference:
        capture_reference(run, prepared, model)
    if request.llama_base:
        _capture_llama_base(run, prepared, model, request)
    del model
    for name, export_request in request.merged.items():
        _capture_merged(run, prepared, name, export_request)


def check_base(run: RunDirectory, base: Base) -> None:
    """Raise RunDirectoryError unless `base` is the one that the run was trained on."""
    expected, found = run.manifest.base.files, base.identity["files"]
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        raise RunDirectoryError(
            f"{base.path} is not the base that this run was trained on: {', '.join(differing)} differ",
            "Restore it; the outputs of another base are no reference for this adapter",
        )


# -- merged models -----------------------------------------------------------------------------------------------------


def _capture_merged(run: RunDirectory, prepared: PreparedRun, name: str, request: ExportRequest) -> None:
    """Merge as the export does, run the result in transformers, and store its divergence from the trained model."""
    reference = Reference.open(run.reference)
    if prepared.config.adapter.virtual_tokens:
        raise ConfigError(
            f"--merged {name}: {prepared.config.adapter.facts.title} has virtual tokens, and nothing to merge",
            "Leave out --merged; `edgetune validate` measures the exported file",
        )
    if name == "nf4" and prepared.config.quantization.bits != 4:
        raise ConfigError("--merged nf4: this run was trained on an unquantized base", "Use --merged original")
    with temporary_directory(run.path / f"merged-{name}") as folder:
        with console.byte_progress(f"merge {name}") as progress:
            export(request.for_trial(Target("safetensors", _merged_type(), folder)), progress=progress)
        compared = _compare_directory(folder, prepared, reference, name)
    path = merged.write(reference, name, compared)
    console.note(f"{path.name}: mean KLD {compared.kld.mean():.3g} from the trained model")


def _merged_type() -> str:
    """Return the storage type of the merged model: 16 bits on a GPU, as published models have; 32 bits on the CPU."""
    return "bf16" if torch.cuda.is_available() else "f32"


def _compare_directory(folder: Path, prepared: PreparedRun, reference: Reference, name: str) -> StoredComparison:
    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if on_gpu else torch.float32, device_map={"": 0 if on_gpu else "cpu"},
        use_safetensors=True, trust_remote_code=prepared.config.trust_remote_code,
    ).eval()  # fmt: skip
    parts: list[StoredComparison] = []
    done = 0
    with torch.inference_mode(), console.count_progress(f"merged {name}") as progress:
        for batch in forward.batches_for_device(model, reference.rows):
            for logits in forward.compute_logits(model, batch):
                parts.append(reference.compare(done, logits))
                done += len(logits)
            progress(done, len(reference.rows.positions))
    return StoredComparison(
        *(np.concatenate([getattr(part, array) for part in parts]) for array in ("kld", "top", "nll"))
    )


# -- llama.cpp's base file ---------------------------------------------------------------------------------------------


def _capture_llama_base(run: RunDirectory, prepared: PreparedRun, model: Any, request: RecaptureRequest) -> None:
    """Write the trained model's outputs on chunks of text in the format of llama-perplexity --kl-divergence-base."""
    assert request.llama_base is not None
    config = model.get_base_model().config.get_text_config()
    context = min(request.llama_context, longest_context(config))
    chunks = split_into_chunks(_tokens(run, prepared, request.llama_text), context)
    bos = _added_bos(prepared.tokenizer)
    dtype, products = generate.capture_precision(model, prepared.config)
    scored = scored_positions(context)
    with (
        KldBaseWriter(request.llama_base, chunks, config.vocab_size) as writer,
        torch.inference_mode(),
        products(),
        console.count_progress("chunks") as progress,
    ):
        for done, chunk in enumerate(chunks, 1):
            for logits in forward.compute_logits(model, forward.Batch([with_bos(chunk, bos)], [scored])):
                writer.add(logits)
            progress(done, len(chunks))
    console.note(f"{request.llama_base}: {len(chunks)} chunks of {context} tokens, computed in {dtype}")


def _tokens(run: RunDirectory, prepared: PreparedRun, text: Path | None) -> Any:
    if text is None:
        reference = Reference.open(run.reference)
        return reference.main_rows.tokens
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text} is not a readable text file: {error}", "Give UTF-8 text") from None
    ids, _ = prepared.tokenizer.encode(content)
    if problem := prepared.tokenizer.without_row(ids):
        raise DataError(f"{text} {problem}", "Remove the token from the text")
    return np.asarray(ids, np.int32)


def _added_bos(tokenizer: TextTokenizer) -> int | None:
    """Return the BOS token if the tokenizer adds it to every text, as the exported file does."""
    return tokenizer.bos_id if tokenizer.adds_bos else None
