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
from edgetune.runtime.causal import CausalRuntime
from edgetune.runtime.interface import RuntimeProblem
from edgetune.runtime.interrupts import InterruptFlag
from edgetune.runtime.llama_library import collecting_errors, library
from edgetune.runtime.llama_vocabulary import LlamaVocabulary
from edgetune.runtime.long_runs import long_run
from edgetune.runtime.threads import default_threads
from edgetune_converters.gguf import reader
from edgetune_converters.gguf.whole import check_data
from edgetune_converters.preparation import Preparation

_BATCH = 512  # tokens per forward pass; llama.cpp's own default for the physical batch
_OUTPUT_BYTES = 128 << 20  # of logits at a time: 512 rows up to a vocabulary of 64k, 220 at 152k
_DEFAULT_CONTEXT = 4096  # models made for 128k tokens would otherwise take gigabytes of cache for a one-line question
_UNQUANTIZED = {0: "f32", 1: "f16", 32: "bf16"}  # general.file_type
_NO_ROOM, _ABORTED = 1, 2  # llama_decode, llama.h


class LlamaRuntime(CausalRuntime):
    """A GGUF file in llama.cpp. See `Runtime` for what it offers."""

    _model: Any = None
    _context: Any = None
    _batch: Any = None
    _interrupt: InterruptFlag | None = None

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
            self._preparation = Preparation.of(self.metadata)
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
        """The context (key-value cache and buffers) and a batch that is reused for every call."""
        self._interrupt = self._flag = InterruptFlag()
        self._outputs = max(1, min(_BATCH, _OUTPUT_BYTES // (4 * self.vocabulary_size)))
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_outputs_max = self._outputs
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.abort_callback = self._flag.callback(self._library.ggml_abort_callback)
        parameters.abort_callback_data = self._flag.data
        with collecting_errors() as errors:
            self._context = self._library.llama_init_from_model(self._model, parameters)
        if self._context is None:
            raise RuntimeProblem(
                f"llama.cpp cannot make a context of {context} tokens: {errors.cause}", "Ask for less with --context."
            )
        self.context: int = context  # llama.cpp rounds up to 256; what was asked for is what is promised
        self._memory: Any = self._library.llama_get_memory(self._context)
        self._make_batch()

    def _make_batch(self) -> None:
        self._batch = batch = self._library.llama_batch_init(_BATCH, 0, 1)
        self._tokens = np.ctypeslib.as_array(batch.token, (_BATCH,))
        self._positions = np.ctypeslib.as_array(batch.pos, (_BATCH,))
        self._wanted = np.ctypeslib.as_array(batch.logits, (_BATCH,))
        np.ctypeslib.as_array(batch.n_seq_id, (_BATCH,))[:] = 1
        for i in range(_BATCH):
            batch.seq_id[i][0] = 0

    def tokenize(self, text: str) -> list[int]:
        """See Runtime. Prepared as the tokenizer of training did, which llama.cpp by itself does not."""
        prepared = self._preparation.apply(text)
        run = long_run(self.metadata, prepared)
        if run is not None:
            raise RuntimeProblem(
                f"the text has {len(run)} characters and more without a space or full stop in between "
                f"({run[:20]!r}...), which ends llama.cpp for this model",
                "Put spaces in.",
            )
        return self._vocabulary.tokenize(prepared)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """See Runtime."""
        return self._vocabulary.token_bytes(token, special=special)

    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """See Runtime. Tokens after the last scored one are not evaluated."""
        if not len(positions):
            return
        self._check_ids(ids[: positions[-1]])
        wanted = np.zeros(positions[-1], np.int8)
        wanted[positions - 1] = 1
        self._library.llama_memory_clear(self._memory, False)
        for start, stop in _pieces(wanted, self._outputs):
            self._decode(ids[start:stop], start, wanted[start:stop])
            count = int(wanted[start:stop].sum())
            if count:
                yield self._logits(count)

    def _prefill(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        self._library.llama_memory_clear(self._memory, False)
        wanted = np.zeros(len(prompt), np.int8)
        wanted[-1] = 1
        for start in range(0, len(prompt), _BATCH):
            stop = min(start + _BATCH, len(prompt))
            self._decode(prompt[start:stop], start, wanted[start:stop])
        return self._last_logits()

    def _decode(self, ids: NDArray[np.int32], start: int, wanted: NDArray[np.int8]) -> None:
        """Evaluate ids [n <= _BATCH] at positions start.. and keep the logits of those that are wanted."""
        count = len(ids)
        self._batch.n_tokens = count
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(start, start + count)
        self._wanted[:count] = wanted
        while True:
            with self._flag.watching():
                status = self._library.llama_decode(self._context, self._batch)
            if status != _ABORTED:  # a KeyboardInterrupt is raised before we get here
                break
            self._library.llama_memory_seq_rm(self._memory, 0, start, -1)  # another signal: once more
        if status:
            raise self._stopped(start, status)

    def _step(self, token: int, position: int) -> NDArray[np.float32]:
        batch = self._batch
        batch.n_tokens = 1
        batch.token[0] = token
        batch.pos[0] = position
        batch.logits[0] = 1
        self._flag.lower()
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise self._stopped(position, status)
        return self._last_logits()

    def _last_logits(self) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._logits(1)[0]
        return logits

    def _logits(self, count: int) -> NDArray[np.float32]:
        """[count, V], llama.cpp's own buffer."""
        pointer = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (count, self.vocabulary_size))

    def _stopped(self, position: int, status: int) -> RuntimeProblem:
        reason = "there is no room in its context" if status == _NO_ROOM else f"status {status}"
        return RuntimeProblem(f"llama.cpp stopped at token {position} of {self.path}: {reason}")

    def verify(self) -> None:
        """See Runtime."""
        check_data(self.path)

    def close(self) -> None:
        """See Runtime. Idempotent."""
        frees = {"_batch": "llama_batch_free", "_context": "llama_free", "_model": "llama_model_free"}
        for name, free in frees.items():
            if (held := getattr(self, name)) is not None:
                setattr(self, name, None)
                getattr(self._library, free)(held)
        if self._interrupt is not None:
            self._interrupt.close()
            self._interrupt = None


def _pieces(wanted: NDArray[np.int8], outputs: int) -> Iterator[tuple[int, int]]:
    """Cut 0..len(wanted) into pieces of at most `_BATCH` tokens and `outputs` wanted ones."""
    so_far = np.concatenate([[0], np.cumsum(wanted, dtype=np.int64)])
    start = 0
    while start < len(wanted):
        # the last `stop` up to which no more than `outputs` are wanted
        stop = int(np.searchsorted(so_far, so_far[start] + outputs, side="right")) - 1
        stop = min(stop, start + _BATCH, len(wanted))
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
