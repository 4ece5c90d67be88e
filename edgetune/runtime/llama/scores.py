"""The scores of a reward model in a GGUF file: its score head on the hidden state of the last token."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime.llama_library import collecting_errors, library
from edgetune.runtime.threads import default_threads
from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf import keys, reader

F32 = NDArray[np.float32]
_NO_POOLING = 0  # llama.h: the hidden state of each token


def has_score_head(path: Path) -> bool:
    """Whether a GGUF file carries a score head."""
    return path.suffix == ".gguf" and keys.SCORE_HEAD in reader.read(path).metadata


def score_rows(path: Path, rows: Sequence[Sequence[int]], threads: int | None = None) -> F32:
    """Return the score f32 of each row of token ids.

    Raises:
        ArtifactError: The file has no score head, or one of another size.
        RuntimeProblem: llama.cpp cannot run it.
    """
    file = reader.read(path)
    stored = file.metadata.get(keys.SCORE_HEAD)
    if stored is None:
        raise ArtifactError(f"{path} is no reward model: it has no {keys.SCORE_HEAD}", "Export the run of one")
    head = np.frombuffer(base64.b64decode(str(stored)), "<f4")
    lib = library()
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    with collecting_errors() as errors:
        model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    if model is None:
        raise RuntimeProblem(f"llama.cpp cannot load {path}: {errors.cause}", "Look at it with `edgetune inspect`")
    try:
        if lib.llama_model_n_embd(model) != len(head):
            raise ArtifactError(
                f"{path}: the score head has {len(head)} values, and the model {lib.llama_model_n_embd(model)}",
                "Export it again",
            )
        context = _make_context(lib, model, max(map(len, rows)), threads or default_threads(file.size))
        try:
            hidden = [_last_hidden(lib, context, row, len(head)) for row in rows]
        finally:
            lib.llama_free(context)
    finally:
        lib.llama_model_free(model)
    return np.array([float(state.astype(np.float64) @ head) for state in hidden], np.float32)


def _make_context(lib: Any, model: Any, cells: int, threads: int) -> Any:
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = cells
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.embeddings = True
    parameters.pooling_type = _NO_POOLING
    with collecting_errors() as errors:
        context = lib.llama_init_from_model(model, parameters)
    if context is None:
        raise RuntimeProblem(f"llama.cpp cannot create a context: {errors.cause}", "Give shorter rows")
    return context


def _last_hidden(lib: Any, context: Any, ids: Sequence[int], size: int) -> F32:
    lib.llama_memory_clear(lib.llama_get_memory(context), False)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for position, id_ in enumerate(ids):
            batch.token[position], batch.pos[position] = id_, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = 1  # llama.cpp wants the hidden states of all tokens
        if status := lib.llama_decode(context, batch):
            raise RuntimeProblem(f"llama.cpp cannot evaluate a row of {len(ids)} tokens (status {status})")
        return np.ctypeslib.as_array(lib.llama_get_embeddings_ith(context, len(ids) - 1), (size,)).copy()
    finally:
        lib.llama_batch_free(batch)
