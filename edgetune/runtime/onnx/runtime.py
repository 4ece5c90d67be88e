"""ONNX folders through plain ONNX Runtime: the graph's own key-value cache in place, logits into one buffer.

Not through onnxruntime-genai, which copies, allocates for every token and hides the logits; its folders can be run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.chat import ChatTemplate
from edgetune.runtime.batching import ScoreRequest, SequenceBatch
from edgetune.runtime.causal import CausalRuntime
from edgetune.runtime.interface import RuntimeProblem
from edgetune.runtime.onnx import graph_interface, model_file
from edgetune.runtime.onnx.batch import OnnxSequences, PaddedScoring, sequence_capacity
from edgetune.runtime.onnx.decoder import Decoder
from edgetune.runtime.onnx.folder import OnnxFolder
from edgetune.runtime.onnx.session import error_text, open_session
from edgetune.runtime.onnx.vocabulary import OnnxVocabulary
from edgetune.runtime.threads import ProcessorTime, default_threads

_BATCH = 512  # tokens per forward pass
_OUTPUT_BYTES = 64 << 20  # of logits at a time, as for llama.cpp
_ROWS = 128  # of logits at a time: a head in two stages takes 64 rows of the embedding for each
_DEFAULT_CONTEXT = 4096


class OnnxRuntime(CausalRuntime):
    """An ONNX folder in ONNX Runtime. See `Runtime` for what it offers."""

    _decoder: Decoder | None = None

    def __init__(
        self, path: Path, *, threads: int | None = None, context: int | None = None, clip: bool = False
    ) -> None:
        """Raises ArtifactError for a damaged or foreign folder, RuntimeProblem for one that cannot be run."""
        before = ProcessorTime.now()
        folder = OnnxFolder.open(path)
        model = model_file.read(folder.graph)
        model.check_receipt(folder.directory)
        self._interface = graph_interface.read_interface(folder, model)
        self.path = path
        self.size = model.size
        self.is_quantized = model.is_quantized
        self.threads = threads or default_threads(model.size)
        self.trained_context = _trained_context(folder)
        self.context = _context(folder, self.trained_context, context, clip)
        self.vocabulary_size = self._interface.vocabulary_size
        self._model = model
        self.metadata: Mapping[str, Any] = model.metadata
        self._vocabulary = OnnxVocabulary(folder.directory, self.vocabulary_size)
        self.bos_token = self._vocabulary.bos
        self.stop_tokens = self._vocabulary.stop_tokens | folder.stop_ids
        self.chat_template = ChatTemplate.find(folder.directory)
        self._rows = max(1, min(_BATCH, _ROWS, _OUTPUT_BYTES // (4 * self.vocabulary_size)))
        # without a range, logits are computed for every token of a call
        self._batch = _BATCH if self._interface.range else self._rows
        session = open_session(model, self.threads, spinning=self.threads > 1 and before.leaves(self.threads))
        self._session: Any = session
        self._decoder = Decoder(session, self._interface, self.context, min(self._batch, self.context), self._rows)

    def tokenize(self, text: str) -> list[int]:
        """See Runtime."""
        return self._vocabulary.tokenize(text)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """See Runtime."""
        return self._vocabulary.token_bytes(token, special=special)

    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """See Runtime. Tokens after the last scored one are not evaluated."""
        if not len(positions):
            return
        self._check_ids(ids[: positions[-1]])
        wanted = positions - 1
        for start, stop in _pieces(wanted, self._batch, self._rows):
            own = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)] - start
            if not len(own):
                self._evaluate(ids[start:stop], start, stop - start - 1)
                continue
            first = int(own[0])
            logits = self._evaluate(ids[start:stop], start, first, int(own[-1]) + 1)
            yield logits if len(logits) == len(own) else logits[own - first]

    def _prefill(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        for start in range(0, len(prompt), self._batch):
            piece = prompt[start : start + self._batch]
            logits = self._evaluate(piece, start, len(piece) - 1)
        last: NDArray[np.float32] = logits[0]
        return last

    def _make_rows(self, count: int, length: int) -> SequenceBatch:
        size = sequence_capacity(self._interface, count, length)
        if size == 1:
            return super()._make_rows(count, length)
        past = self._open().past
        return OnnxSequences(self._session, self._interface, size, length, self._prefill, past, self._stopped)

    def _groups(self, rows: list[ScoreRequest]) -> list[list[ScoreRequest]]:
        return PaddedScoring(self._session, self._interface, self._rows).groups(rows)

    def _score_together(self, group: Sequence[ScoreRequest]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        self._open()
        try:
            yield from PaddedScoring(self._session, self._interface, self._rows).scored(group)
        except Exception as error:  # noqa: BLE001 - its exceptions have no common base but this
            raise self._stopped(0, error) from None

    def _evaluate(self, ids: NDArray[np.int32], start: int, first: int, end: int | None = None) -> NDArray[np.float32]:
        try:
            return self._open().evaluate(ids, start, first, first + 1 if end is None else end)
        except Exception as error:  # noqa: BLE001 - its exceptions have no common base but this
            raise self._stopped(start, error) from None

    def _step(self, token: int, position: int) -> NDArray[np.float32]:
        try:
            return self._open().step(token, position)
        except Exception as error:  # noqa: BLE001
            raise self._stopped(position, error) from None

    def _open(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeProblem(f"{self.path} has been closed")
        return self._decoder

    def _stopped(self, position: int, error: Exception) -> RuntimeProblem:
        if isinstance(error, RuntimeProblem):
            return error
        return RuntimeProblem(f"ONNX Runtime stopped at token {position} of {self.path}: {error_text(error)}")

    def give(self, name: str, values: NDArray[Any]) -> None:
        """Take an input that has a default from a buffer, whose contents may be changed between calls."""
        self._open().give(name, values)

    def verify(self) -> None:
        """See Runtime."""
        self._model.verify()

    def close(self) -> None:
        """See Runtime. Idempotent."""
        self._decoder = self._session = None


def _trained_context(folder: OnnxFolder) -> int:
    if folder.trained_context is None:
        raise RuntimeProblem(
            f"neither genai_config.json nor config.json in {folder.directory} says how long the context may be",
            'Write {"max_position_embeddings": N} into config.json.',
        )
    return folder.trained_context


def _context(folder: OnnxFolder, trained: int, asked: int | None, clip: bool) -> int:
    """Rotary embeddings are tables in the graph that end with the model's context: there is no more to be had."""
    if asked is not None and asked > trained and not clip:
        raise RuntimeProblem(
            f"a context of {asked} tokens is asked for, and {folder.path} was made for {trained}",
            f"Ask for {trained} or less with --context.",
        )
    return min(trained, asked or _DEFAULT_CONTEXT)


def _pieces(wanted: NDArray[np.int64], batch: int, rows: int) -> Iterator[tuple[int, int]]:
    """Cut 0..wanted[-1] into pieces of at most `batch` tokens; from the first to the last wanted one at most `rows`."""
    start, end = 0, int(wanted[-1]) + 1
    while start < end:
        stop = min(start + batch, end)
        own = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
        if len(own) and own[-1] - own[0] >= rows:
            stop = int(own[0]) + rows
        yield start, stop
        start = stop
