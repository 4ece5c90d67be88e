"""Run ONNX folders with plain ONNX Runtime: the key-value cache stays in place, logits go into one buffer.

onnxruntime-genai is not used, because it copies, allocates for every token and hides the logits. Its folders run too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edgetune.data.chat import ChatTemplate, named_templates, stored_options
from edgetune.errors import RuntimeProblem
from edgetune.runtime.batching import SequenceBatch
from edgetune.runtime.interface import Runtime, Scoring
from edgetune.runtime.onnx import graph_interface, model_file
from edgetune.runtime.onnx.batch import OnnxSequences, PaddedScoring, ScoreRequest, sequence_capacity
from edgetune.runtime.onnx.decoder import Decoder
from edgetune.runtime.onnx.folder import OnnxFolder
from edgetune.runtime.onnx.prefix_cache import Past
from edgetune.runtime.onnx.session import error_text, open_session
from edgetune.runtime.onnx.vocabulary import OnnxVocabulary
from edgetune.runtime.prefix_state import read_prefix
from edgetune.runtime.slots import SPECULATION, BatchSlots, Slots, Speculation
from edgetune.runtime.soft_prompt import read_soft_prompt
from edgetune.runtime.threads import ProcessorTime, default_threads

_BATCH = 512  # tokens per forward pass
_OUTPUT_BYTES = 64 << 20  # of logits at a time
_OUTPUTS = 128  # rows of logits at a time: a head in two stages reads 64 rows of the embedding for each
_DEFAULT_CONTEXT = 4096


class OnnxRuntime(Runtime):
    """An ONNX folder in ONNX Runtime."""

    format = "onnx"

    _decoder: Decoder | None = None

    def __init__(
        self, path: Path, *, threads: int | None = None, context: int | None = None, clip: bool = False
    ) -> None:
        """Open the folder. Raises ArtifactError if it is damaged, RuntimeProblem if it cannot be run."""
        spent = ProcessorTime.now()
        folder = OnnxFolder.open(path)
        model = model_file.read(folder.graph)
        model.check_receipt(folder.directory)
        self._interface = graph_interface.read_interface(folder, model)
        self.path = path
        self.size = model.size
        self.is_quantized = model.is_quantized
        self.threads = threads or default_threads(model.size)
        self._model = model
        self.metadata: Mapping[str, Any] = model.metadata
        rows = self._interface.vocabulary_size
        soft = read_soft_prompt(self.metadata, rows)
        state = read_prefix(self.metadata, folder.directory)
        before = soft.count if soft else state.length if state else 0  # tokens of the cache before every text
        self.trained_context = _trained_context(folder) - before
        self.context = _context(folder, self.trained_context, context, clip)
        self.hidden_rows = soft.added if soft else 0
        self.vocabulary_size = rows - self.hidden_rows
        self._vocabulary = OnnxVocabulary(folder.directory, rows)
        self.bos_token = self._vocabulary.bos
        self.stop_tokens = self._vocabulary.stop_tokens | folder.stop_ids
        template = ChatTemplate.find(folder.directory)
        self.template_names = tuple(named_templates(folder.directory))
        self.chat_template = template and template.with_options(stored_options(self.metadata))
        if soft:
            self._vocabulary.add_bos(adds=soft.adds_bos)
            texts = b"".join(self._vocabulary.token_bytes(int(id_), special=True) for id_ in soft.ids)
            self.chat_template = soft.plain_template(self.chat_template, texts.decode())
        self._outputs = max(1, min(_BATCH, _OUTPUTS, _OUTPUT_BYTES // (4 * self.vocabulary_size)))
        # without a range, logits are computed for every token of a call
        self._batch = _BATCH if self._interface.range else self._outputs
        session = open_session(model, self.threads, spinning=self.threads > 1 and spent.leaves_idle(self.threads))
        self._session: Any = session
        batch = min(self._batch, self.context)
        self._decoder = Decoder(
            session, self._interface, self.context + before, batch, self._outputs, self.vocabulary_size
        )
        self.is_reward_model = self._interface.score is not None
        self._prefix: Past = []
        if soft:
            self._put_before_texts(soft.ids)
        if state:
            self._set_prefix([*state.keys, *state.values])

    def _put_before_texts(self, ids: NDArray[np.int32]) -> None:
        """Evaluate tokens once, and keep their keys and values before every text."""
        self._prefill(ids)
        self._set_prefix([np.array(values) for values in self._open().past(len(ids))])

    def _set_prefix(self, prefix: Past) -> None:
        shapes = [(cache.heads, cache.head_size) for cache in self._interface.caches]
        if [(values.shape[0], values.shape[2]) for values in prefix] != shapes:
            raise RuntimeProblem(f"the prefix of {self.path} is not for this model", "Export the model again")
        self._prefix = prefix
        self._open().set_prefix(prefix)

    @override
    def tokenize(self, text: str) -> list[int]:
        return self._vocabulary.tokenize(text)

    @override
    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        return self._vocabulary.token_bytes(token, special=special)

    @override
    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        if not len(positions):
            return
        self.check_ids(ids[: positions[-1]])
        outputs = positions - 1
        for start, stop in _pieces(outputs, self._batch, self._outputs):
            own = outputs[np.searchsorted(outputs, start) : np.searchsorted(outputs, stop)] - start
            if not len(own):
                self._evaluate(ids[start:stop], start, stop - start - 1)
                continue
            first = int(own[0])
            logits = self._evaluate(ids[start:stop], start, first, int(own[-1]) + 1)
            yield logits if len(logits) == len(own) else logits[own - first]

    @override
    def _score_together(self, texts: Sequence[Scoring]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        requests = [ScoreRequest.at(index, *text) for index, text in enumerate(texts) if len(text[1])]
        padded = PaddedScoring(self._session, self._interface, self._outputs, self._open().width, self._prefix)
        for group in padded.groups(requests):
            if len(group) == 1:
                index = group[0].index
                yield from ((index, block) for block in self.score(*texts[index]))
            else:
                yield from self._score_group(padded, group)

    def _score_group(
        self, padded: PaddedScoring, group: Sequence[ScoreRequest]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        self._open()
        try:
            yield from padded.score(group)
        except Exception as error:  # noqa: BLE001 - its exceptions have no other common base
            raise self._failure(0, error) from None

    @override
    def _show_hidden_rows(self, *, shown: bool) -> None:
        self._open().width = self.vocabulary_size + self.hidden_rows * shown

    @override
    def _reward_scores(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        found = []
        for row in rows:
            self._prefill(row)
            found.append(float(self._open().score[0, 0]))
        return found

    @override
    def _prefill(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._prefill_behind(prompt, 0, [])

    def _prefill_behind(self, prompt: NDArray[np.int32], known: int, past: Past) -> NDArray[np.float32]:
        """Evaluate a prompt behind its first `known` tokens, whose keys and values, with the prefix, are `past`."""
        if known:
            self._open().restore(past)
        for start in range(known, len(prompt), self._batch):
            piece = prompt[start : start + self._batch]
            logits = self._evaluate(piece, start, len(piece) - 1)
        last: NDArray[np.float32] = logits[0]
        return last

    @override
    def _make_batch(self, count: int, length: int) -> SequenceBatch:
        length += self._prefix[0].shape[1] if self._prefix else 0
        capacity = sequence_capacity(self._interface, count, length)
        return self._single_sequence() if capacity == 1 else self._make_sequences(capacity, length)

    @override
    def make_slots(self, count: int, *, is_exact: bool = False, speculation: Speculation = SPECULATION) -> Slots:
        if is_exact or speculation.draft is not None or not self._interface.takes_batch:
            return super().make_slots(count, is_exact=is_exact, speculation=speculation)
        length = self.context + (self._prefix[0].shape[1] if self._prefix else 0)
        capacity = sequence_capacity(self._interface, count, length)
        batch = self._make_sequences(capacity, length, keeps_prefixes=True)
        return BatchSlots(batch, self.sampler_vocabulary, self.token_bytes)

    def _make_sequences(self, capacity: int, length: int, *, keeps_prefixes: bool = False) -> OnnxSequences:
        return OnnxSequences(
            self._session, self._interface, capacity, length, self._prefill_behind, self._open().past, self._failure,
            self.vocabulary_size, keeps_prefixes=keeps_prefixes,
        )  # fmt: skip

    def _evaluate(self, ids: NDArray[np.int32], start: int, first: int, end: int | None = None) -> NDArray[np.float32]:
        try:
            return self._open().evaluate(ids, start, first, first + 1 if end is None else end)
        except Exception as error:  # noqa: BLE001 - its exceptions have no other common base
            raise self._failure(start, error) from None

    @override
    def _step(self, token: int, position: int) -> NDArray[np.float32]:
        try:
            return self._open().step(token, position)
        except Exception as error:  # noqa: BLE001
            raise self._failure(position, error) from None

    def _open(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeProblem(f"{self.path} has been closed")
        return self._decoder

    def _failure(self, position: int, error: Exception) -> RuntimeProblem:
        if isinstance(error, RuntimeProblem):
            return error
        return RuntimeProblem(f"ONNX Runtime stopped at token {position} of {self.path}: {error_text(error)}")

    @override
    def bind_input(self, name: str, buffer: NDArray[Any]) -> None:
        decoder = self._open()
        try:
            decoder.bind_extra(name, buffer)
        except Exception as error:  # noqa: BLE001 - its exceptions have no other common base
            raise RuntimeProblem(f"{self.path} has no input {name!r} of this type: {error_text(error)}") from None

    @override
    def verify(self) -> None:
        self._model.verify()

    @override
    def close(self) -> None:
        self._decoder = self._session = None


def _trained_context(folder: OnnxFolder) -> int:
    if folder.trained_context is None:
        raise RuntimeProblem(
            f"neither genai_config.json nor config.json in {folder.directory} gives the length of the context",
            'Write {"max_position_embeddings": N} into config.json',
        )
    return folder.trained_context


def _context(folder: OnnxFolder, trained: int, requested: int | None, clip: bool) -> int:
    """Return the context to use: the rotary tables in the graph end with the trained context."""
    if requested is not None and requested > trained and not clip:
        raise RuntimeProblem(
            f"a context of {requested} tokens was requested, but {folder.path} was made for {trained}",
            f"Ask for {trained} or less with --context",
        )
    return min(trained, requested or _DEFAULT_CONTEXT)


def _pieces(outputs: NDArray[np.int64], batch: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut 0..outputs[-1] into pieces of at most `batch` tokens, at most `most` from first to last output."""
    start, end = 0, int(outputs[-1]) + 1
    while start < end:
        stop = min(start + batch, end)
        own = outputs[np.searchsorted(outputs, start) : np.searchsorted(outputs, stop)]
        if len(own) and own[-1] - own[0] >= most:
            stop = int(own[0]) + most
        yield start, stop
        start = stop
