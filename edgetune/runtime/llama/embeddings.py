"""Embeddings of texts: the mean of llama.cpp's last hidden states, or the last of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime.interface import Pooling
from edgetune.runtime.llama_library import collecting_errors, library

_NO_POOLING = 0  # LLAMA_POOLING_TYPE_NONE
_BATCH = 512


class LlamaEmbedder:
    """A context of its own on a loaded model, so that generation goes on meanwhile. Thread-safe."""

    def __init__(self, model: Any, path: Path, *, cells: int, threads: int) -> None:
        """Create the context. Raises RuntimeProblem if llama.cpp cannot allocate it.

        Args:
            model: The model of llama.cpp.
            path: Its file, for messages.
            cells: Tokens of a text.
            threads: Threads that evaluate it.
        """
        self._library, self._path = library(), path
        self._lock = threading.Lock()
        self._size: int = self._library.llama_model_n_embd(model)
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = min(cells, _BATCH)
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.embeddings = True
        parameters.pooling_type = _NO_POOLING
        with collecting_errors() as errors:
            self._context: Any = self._library.llama_init_from_model(model, parameters)
        if self._context is None:
            raise RuntimeProblem(f"llama.cpp cannot create a context for embeddings: {errors.cause}")

    def embed(self, ids: Sequence[int], pooling: Pooling) -> NDArray[np.float32]:
        """Return the mean of the hidden states [n_embd] of all tokens, or the hidden state of the last one."""
        with self._lock:
            if self._context is None:
                raise RuntimeProblem(f"{self._path} was closed")
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            total = np.zeros(self._size, np.float64)
            for start in range(0, len(ids), _BATCH):
                states = self._states(ids[start : start + _BATCH], start)
                total += states.sum(axis=0)
        result = states[-1] if pooling == "last" else total / len(ids)
        return result.astype(np.float32)

    def _states(self, ids: Sequence[int], start: int) -> NDArray[np.float64]:
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, id_ in enumerate(ids):
                batch.token[place], batch.pos[place] = id_, start + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = 1
            if status := self._library.llama_decode(self._context, batch):
                raise RuntimeProblem(f"llama.cpp cannot evaluate {len(ids)} tokens of {self._path} (status {status})")
            states = np.ctypeslib.as_array(self._library.llama_get_embeddings(self._context), (len(ids), self._size))
            return states.astype(np.float64)
        finally:
            self._library.llama_batch_free(batch)

    def close(self) -> None:
        """Free the context."""
        with self._lock:
            context, self._context = self._context, None
            if context is not None:
                self._library.llama_free(context)
