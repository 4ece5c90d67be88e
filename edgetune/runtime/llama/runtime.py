"""GGUF files through llama.cpp's C functions (llama.h, by way of llama-cpp-python's ctypes declarations).

Not through llama-cpp-python's `Llama` class: it keeps n_ctx x n_vocab floats when asked for logits, copies every row of
them, and prints. Here logits stay in llama.cpp's own buffer, at most `_OUTPUT_BYTES` of it, and are handed out as
views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune import console
from edgetune.data.chat import ChatTemplate
from edgetune.runtime.batching import MAX_SEQUENCES, SequenceBatch
from edgetune.runtime.causal import CausalRuntime
from edgetune.runtime.interface import RuntimeProblem
from edgetune.runtime.llama.batch import LlamaSequences, prefill
from edgetune.runtime.llama.context import BATCH, LlamaContext, round_up_cells
from edgetune.runtime.llama.library import collecting_errors, library
from edgetune.runtime.llama.regex_guard import find_overlong_run
from edgetune.runtime.llama.vocabulary import LlamaVocabulary
from edgetune.runtime.threads import default_threads
from edgetune_converters.gguf import reader
from edgetune_converters.gguf.joined import check_data
from edgetune_converters.tokenizers.normalization import Normalization

_OUTPUT_BYTES = 128 << 20  # of logits at a time: 512 rows up to a vocabulary of 64k, 220 at 152k
_DEFAULT_CONTEXT = 4096  # models made for 128k tokens would otherwise take gigabytes of cache for a one-line question
_UNQUANTIZED = {0: "f32", 1: "f16", 32: "bf16"}  # general.file_type
_ROW_CELLS = 8192  # tokens of all rows together that are evaluated at once


class LlamaRuntime(CausalRuntime):
    """A GGUF file in llama.cpp. See `Runtime` for what it offers."""

    _model: Any = None
    _context: LlamaContext | None = None

    def __init__(self, path: Path, *, threads: int | None = None, context: int | None = None) -> None:
        """Raises ArtifactError for a damaged or foreign file, RuntimeProblem for one that llama.cpp cannot run."""
        file = _checked(path)
        self.path = path
        self.size = file.size
        self.is_quantized = file.metadata.get("general.file_type") not in _UNQUANTIZED
        self.threads = threads or default_threads(file.size)
        self.metadata: Mapping[str, Any] = file.metadata
        self._library = library()
        try:
            self._model = self._load()
            self.trained_context: int = self._library.llama_model_n_ctx_train(self._model)
            self._vocabulary = LlamaVocabulary(self._library, self._model)
            self.vocabulary_size = self._vocabulary.size
            self.bos_token = self._vocabulary.bos
            self.stop_tokens = self._vocabulary.stop_tokens
            self.chat_template = ChatTemplate.from_gguf(self.metadata)
            self._normalization = Normalization.from_metadata(self.metadata)
            self._start(context or min(self.trained_context, _DEFAULT_CONTEXT))
        except BaseException:
            self.close()
            raise

    def _load(self) -> Any:
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = _extra_buffers_are_safe()
        with collecting_errors() as errors:
            model = self._library.llama_model_load_from_file(str(self.path).encode(), parameters)
        if model is None:
            raise RuntimeProblem(
                f"llama.cpp cannot load {self.path}: {errors.cause}", "Look at it with `edgetune inspect`."
            )
        return model

    def _start(self, context: int) -> None:
        self._outputs = max(1, min(BATCH, _OUTPUT_BYTES // (4 * self.vocabulary_size)))
        self._context = self._make_context(context, self._outputs)
        self.context: int = context  # llama.cpp rounds up to 256; what was asked for is what is promised

    def _make_context(self, cells: int, outputs: int, sequences: int = 1) -> LlamaContext:
        return LlamaContext(
            self._model, self.path, vocabulary_size=self.vocabulary_size, threads=self.threads, cells=cells,
            outputs=outputs, sequences=sequences,
        )  # fmt: skip

    def tokenize(self, text: str) -> list[int]:
        """See Runtime. Prepared as the tokenizer of training did, which llama.cpp by itself does not."""
        normalized = self._normalization.apply(text)
        run = find_overlong_run(self.metadata, normalized)
        if run is not None:
            raise RuntimeProblem(
                f"the text has {len(run)} characters and more without a space or full stop in between "
                f"({run[:20]!r}...), which ends llama.cpp for this model",
                "Put spaces in.",
            )
        return self._vocabulary.tokenize(normalized)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """See Runtime."""
        return self._vocabulary.token_bytes(token, special=special)

    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """See Runtime. Tokens after the last scored one are not evaluated.

        Rows do not share a batch (`score_batch`): it would be cut at other places, where the attention adds up in 16
        bits, and what is measured of a file would depend on which rows are measured together.
        """
        if not len(positions):
            return
        self._check_ids(ids[: positions[-1]])
        wanted = np.zeros(positions[-1], np.int8)
        wanted[positions - 1] = 1
        context = self._open()
        context.forget()
        for start, stop in _pieces(wanted, self._outputs):
            context.decode(ids[start:stop], start, wanted[start:stop])
            count = int(wanted[start:stop].sum())
            if count:
                yield context.logits(count)

    def _prefill(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        context = self._open()
        context.forget()
        return prefill(context, prompt)

    def _step(self, token: int, position: int) -> NDArray[np.float32]:
        return self._open().step(token, position)

    def _make_rows(self, count: int, length: int) -> SequenceBatch:
        size = min(count, MAX_SEQUENCES, max(1, _ROW_CELLS // round_up_cells(length)))
        if size == 1:
            return super()._make_rows(count, length)
        return LlamaSequences(self._make_context(length, size, size), size)

    def _open(self) -> LlamaContext:
        if self._context is None:
            raise RuntimeProblem(f"{self.path} has been closed")
        return self._context

    def verify(self) -> None:
        """See Runtime."""
        check_data(self.path)

    def close(self) -> None:
        """See Runtime. Idempotent."""
        context, model = self._context, self._model
        self._context = self._model = None
        if context is not None:
            context.close()
        if model is not None:
            self._library.llama_model_free(model)


def _pieces(wanted: NDArray[np.int8], outputs: int) -> Iterator[tuple[int, int]]:
    """Cut 0..len(wanted) into pieces of at most `BATCH` tokens and `outputs` wanted ones."""
    so_far = np.concatenate([[0], np.cumsum(wanted, dtype=np.int64)])
    start = 0
    while start < len(wanted):
        # the last `stop` up to which no more than `outputs` are wanted
        stop = int(np.searchsorted(so_far, so_far[start] + outputs, side="right")) - 1
        stop = min(stop, start + BATCH, len(wanted))
        yield start, stop
        start = stop


def _checked(path: Path) -> reader.GgufFile:
    """Read by our own reader first: llama.cpp may crash on what it finds in a damaged file."""
    file = reader.read(path)
    if not file.tensors:
        raise RuntimeProblem(f"{path} holds no tensors, only a vocabulary", "Give the file of a whole model.")
    return file


@cache
def _extra_buffers_are_safe() -> bool:
    """False where AMX is advertised and faults: llama.cpp's extra buffer types would use it (DESIGN, section 6)."""
    probe = edgetune_native.probe_amx()
    if probe.usable or not probe.advertised:
        return True
    console.warn(f"{probe.reason}; running without AMX and without llama.cpp's repacked weights")
    return False
