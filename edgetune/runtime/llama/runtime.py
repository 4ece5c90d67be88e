"""Run GGUF files with llama.cpp's C API (llama.h), through the ctypes declarations of llama-cpp-python.

Its high-level `Llama` class is not used: it keeps n_ctx x n_vocab floats when logits are requested, copies every row of
them, and prints. Here logits stay in llama.cpp's own buffer, bounded by `_OUTPUT_BYTES`, and are returned as views.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

import edgetune_native
from edgetune.data.chat import ChatTemplate
from edgetune.errors import RuntimeNotice, RuntimeProblem
from edgetune.runtime.batching import MAX_SEQUENCES, SequenceBatch
from edgetune.runtime.generation_request import MAX_LOOKUP
from edgetune.runtime.interface import Pooling, Runtime
from edgetune.runtime.llama.activations import ActivationCollector, ActivationSums
from edgetune.runtime.llama.adapters import load_adapter
from edgetune.runtime.llama.batch import LlamaSequences, prefill
from edgetune.runtime.llama.context import BATCH, LlamaContext, Prefix, round_up_cells
from edgetune.runtime.llama.drafting import Drafting, assumed_costs
from edgetune.runtime.llama.embeddings import LlamaEmbedder
from edgetune.runtime.llama.prefix import EvaluatedPrefix, StoredPrefix
from edgetune.runtime.llama.regex_guard import find_overlong_run
from edgetune.runtime.llama.score_head import read_score_head, score_row
from edgetune.runtime.llama.slots import EngineSlots
from edgetune.runtime.llama.vocabulary import LlamaVocabulary
from edgetune.runtime.llama_library import collecting_errors, library
from edgetune.runtime.machine_fit import MachineFit
from edgetune.runtime.prefix_state import read_prefix
from edgetune.runtime.sampling import SamplerVocabulary
from edgetune.runtime.slots import SPECULATION, LoadedAdapter, Slots, Speculation
from edgetune.runtime.soft_prompt import read_soft_prompt
from edgetune.runtime.threads import default_threads
from edgetune_converters.gguf import keys, reader
from edgetune_converters.gguf.joined import check_data
from edgetune_converters.tokenizers.normalization import Normalization

_OUTPUT_BYTES = 128 << 20  # of logits at a time: 512 rows up to a vocabulary of 64k, 220 at 152k
_DEFAULT_CONTEXT = 4096  # a model for 128k tokens would otherwise take gigabytes of cache for a one-line question
_UNQUANTIZED = {0: "f32", 1: "f16", 32: "bf16"}  # general.file_type
_SHORT_CONTEXT = 8  # of a draft model, whose sequences are in a context of their own
_BATCH_CELLS = 8192  # tokens in the caches of all sequences of a batch together


class LlamaRuntime(Runtime):
    """A GGUF file in llama.cpp."""

    format = "gguf"

    _model: Any = None
    _context: LlamaContext | None = None
    _embedder: LlamaEmbedder | None = None

    def __init__(
        self, path: Path, *, threads: int | None = None, context: int | None = None, fit: MachineFit | None = None
    ) -> None:  # fmt: skip
        """Open the file. Raises ArtifactError if it is damaged, RuntimeProblem if llama.cpp cannot run it."""
        file = _read_checked(path)
        self.path = path
        self.size = file.size
        self.is_quantized = file.metadata.get("general.file_type") not in _UNQUANTIZED
        self._fit = fit or MachineFit()
        self.threads = threads or self._fit.threads or default_threads(file.size)
        self.metadata: Mapping[str, Any] = file.metadata
        self._library = library()
        self._embedder_lock = threading.Lock()
        self._adapters: dict[str, LoadedAdapter] = {}
        self._used_adapters: tuple[tuple[LoadedAdapter, float], ...] = ()
        try:
            self._model = self._load()
            self._vocabulary = LlamaVocabulary(self._library, self._model)
            soft = read_soft_prompt(self.metadata, self._vocabulary.size)
            state = read_prefix(self.metadata, path)
            self._prefix: Prefix | None = StoredPrefix(state, path) if state else None
            if soft:
                self._prefix = EvaluatedPrefix(soft.ids)
            self.trained_context: int = self._library.llama_model_n_ctx_train(self._model)
            self.trained_context -= self._prefix.length if self._prefix else 0
            self.hidden_rows = soft.added if soft else 0
            self.vocabulary_size = self._vocabulary.size - self.hidden_rows
            self.bos_token = self._vocabulary.bos
            self.stop_tokens = self._vocabulary.stop_tokens | _carried_stops(file.metadata)
            self.chat_template = ChatTemplate.from_gguf(self.metadata)
            if soft:
                self._vocabulary.adds_bos = soft.adds_bos
                texts = b"".join(self._vocabulary.token_bytes(int(id_), special=True) for id_ in soft.ids)
                self.chat_template = soft.plain_template(self.chat_template, texts.decode())
            self.template_names = _template_names(self.metadata)
            self._score_head = read_score_head(file.metadata, self._library.llama_model_n_embd(self._model), path)
            self.is_reward_model = self._score_head is not None
            self._normalization = Normalization.from_metadata(self.metadata)
            self._start(context or min(self.trained_context, _DEFAULT_CONTEXT))
        except BaseException:
            self.close()
            raise

    def _load(self) -> Any:
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = self._fit.repacks and _can_use_extra_buffers()
        parameters.use_mmap = self._fit.maps_file
        with collecting_errors() as errors:
            model = self._library.llama_model_load_from_file(str(self.path).encode(), parameters)
        if model is None:
            raise RuntimeProblem(
                f"llama.cpp cannot load {self.path}: {errors.cause}", "Look at it with `edgetune inspect`"
            )
        return model

    def _start(self, context: int) -> None:
        self._outputs = max(1, min(BATCH, _OUTPUT_BYTES // (4 * self.vocabulary_size)))
        self._context = self._make_context(context, self._outputs)
        self.context: int = context  # not rounded up to 256, as llama.cpp does

    def _make_context(
        self,
        cells: int,
        outputs: int,
        sequences: int = 1,
        *,
        is_unified: bool = False,
        for_states: bool = False,
        on_tensor: Any = None,
    ) -> LlamaContext:
        return LlamaContext(
            self._model, self.path, vocabulary_size=self.vocabulary_size, threads=self.threads, cells=cells,
            outputs=outputs, sequences=sequences, prefix=self._prefix, hidden_rows=self.hidden_rows,
            is_unified=is_unified, for_states=for_states, flash_attention=self._fit.flash_attention,
            physical_batch=self._fit.batch, quantizes_cache=self._fit.quantizes_cache, on_tensor=on_tensor,
        )  # fmt: skip

    @override
    def tokenize(self, text: str) -> list[int]:
        normalized = self._normalization.apply(text)  # llama.cpp does not normalize as the tokenizer of training does
        run = find_overlong_run(self.metadata, normalized)
        if run is not None:
            raise RuntimeProblem(
                f"the text has a run of at least {len(run)} characters without whitespace or punctuation "
                f"({run[:20]!r}...), which would overflow the stack of llama.cpp's regex pre-tokenizer",
                "Break it up with whitespace",
            )
        return self._vocabulary.tokenize(normalized)

    @property
    @override
    def sampler_vocabulary(self) -> SamplerVocabulary:
        return super().sampler_vocabulary._replace(pointer=self._vocabulary.pointer)

    @override
    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        return self._vocabulary.token_bytes(token, special=special)

    @override
    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        # Texts do not share a batch (`score_batch`): its cuts would depend on the other texts, and with them the sums
        # of the attention in f16, so the result for one text would depend on which texts are measured together.
        if not len(positions):
            return
        self.check_ids(ids[: positions[-1]])
        outputs = np.zeros(positions[-1], np.int8)
        outputs[positions - 1] = 1
        context = self._open()
        context.begin()
        for start, stop in _pieces(outputs, self._outputs):
            context.decode(ids[start:stop], start, outputs[start:stop])
            count = int(outputs[start:stop].sum())
            if count:
                yield context.logits(count)

    @override
    def embed(self, ids: Sequence[int], pooling: Pooling = "mean") -> NDArray[np.float32]:
        self._open()
        if pooling not in get_args(Pooling):
            raise RuntimeProblem(f"pooling is {pooling!r}", f"Give {' or '.join(get_args(Pooling))}")
        text = np.asarray(ids, np.int32)
        if not len(text):
            raise RuntimeProblem("the text is empty", "Give some text")
        self.check_ids(text)
        if self._prefix is not None:
            raise RuntimeProblem(f"{self.path} has a prefix before every text, which embeddings do not take in")
        with self._embedder_lock:
            if self._embedder is None:
                self._embedder = LlamaEmbedder(self._model, self.path, cells=self.context, threads=self.threads)
        return self._embedder.embed(text.tolist(), pooling)

    @override
    def _show_hidden_rows(self, *, shown: bool) -> None:
        self._open().shows_hidden_rows = shown

    @override
    def _reward_scores(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        head = self._score_head
        assert head is not None
        self._open()
        with closing(self._make_context(max(map(len, rows), default=1), BATCH, for_states=True)) as context:
            return [score_row(context, head, row) for row in rows]

    def add_up_activations(self, rows: Iterable[NDArray[np.int32]]) -> dict[str, ActivationSums]:
        """Evaluate rows of token ids and return the sums of the squared inputs of each matrix, by tensor name.

        Call it in another than the main thread, so that Ctrl-C is not lost. A row is cut at the context.

        Raises:
            RuntimeProblem: The model computes values that are not finite, or llama.cpp is another than edgetune knows.
        """
        self._open()
        collector = ActivationCollector(self._library)
        context = self._make_context(self.context, BATCH, for_states=True, on_tensor=collector.callback)
        with closing(context):
            for row in rows:
                ids = row[: self.context]
                self.check_ids(ids)
                context.begin()
                for start in range(0, len(ids), BATCH):
                    piece = ids[start : start + BATCH]
                    with collector.watching():
                        context.decode(piece, start, np.ones(len(piece), np.int8))
        return collector.sums

    @override
    def _prefill(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        return prefill(self._open(), prompt)

    @override
    def _step(self, token: int, position: int) -> NDArray[np.float32]:
        return self._open().step(token, position)

    @property
    @override
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        return dict(self._adapters)

    @override
    def load_adapter(self, path: Path, name: str) -> None:
        self._open()
        if name in self._adapters:
            raise RuntimeProblem(f"an adapter {name!r} is loaded already", "Unload it, or give another name")
        self._adapters[name] = load_adapter(self._model, path)

    @override
    def unload_adapter(self, name: str) -> None:
        ((adapter, _),) = self.find_adapters(((name, 1.0),))
        if any(used is adapter for used, _ in self._used_adapters):
            self.use_adapters(())
        del self._adapters[name]
        self._library.llama_adapter_lora_free(adapter.pointer)

    @override
    def use_adapters(self, adapters: Sequence[tuple[str, float]]) -> None:
        self._used_adapters = self.find_adapters(adapters)
        self._open().set_adapters(self._used_adapters)

    @override
    def evaluate_rows(self, ids: NDArray[np.int32], position: int) -> bool:
        context = self._open()
        context.decode(ids, position, np.ones(len(ids), np.int8))
        return context.cut(position)

    @override
    def make_slots(self, count: int, *, is_exact: bool = False, speculation: Speculation = SPECULATION) -> Slots:
        if not edgetune_native.has_llama_slots():
            return super().make_slots(count, is_exact=is_exact, speculation=speculation)
        self._open()
        drafting = None if is_exact else Drafting.make(
            self.path, self.metadata, speculation, lambda path: self._open_draft(path, count)
        )  # fmt: skip
        context = self._make_context(self.context, count * (1 + MAX_LOOKUP), count)
        is_recurrent = self._library.llama_model_is_recurrent(self._model)
        can_draft = not (is_recurrent or self._library.llama_model_is_hybrid(self._model))
        costs = speculation.costs or assumed_costs(self.size)
        return EngineSlots(
            context, self.sampler_vocabulary, count, is_exact=is_exact, can_draft=can_draft,
            drafting=drafting, costs=costs, adapts=speculation.adapts,
        )  # fmt: skip

    def _open_draft(self, path: Path, count: int) -> tuple[LlamaRuntime, LlamaContext]:
        """Open a draft model, with a context for `count` sequences as long as this model's."""
        model = LlamaRuntime(path, threads=self.threads, context=_SHORT_CONTEXT)
        try:
            return model, model._make_context(self.context + BATCH, count, count)
        except BaseException:
            model.close()
            raise

    @override
    def _make_batch(self, count: int, length: int) -> SequenceBatch:
        capacity = min(count, MAX_SEQUENCES, max(1, _BATCH_CELLS // round_up_cells(length)))
        if capacity == 1:
            return self._single_sequence()
        context = self._make_context(length, capacity, capacity)
        context.set_adapters(self._used_adapters)
        return LlamaSequences(context, capacity)

    def _open(self) -> LlamaContext:
        if self._context is None:
            raise RuntimeProblem(f"{self.path} has been closed")
        return self._context

    @override
    def verify(self) -> None:
        check_data(self.path)

    @override
    def close(self) -> None:
        context, model, embedder = self._context, self._model, self._embedder
        self._context = self._model = self._embedder = None
        if embedder is not None:
            embedder.close()
        if context is not None:
            context.close()
        if model is not None:
            self._library.llama_model_free(model)


def _template_names(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    default = ("default",) if "tokenizer.chat_template" in metadata else ()
    return (*default, *metadata.get("tokenizer.chat_templates", ()))


def _carried_stops(metadata: Mapping[str, Any]) -> frozenset[int]:
    """Stop tokens for which GGUF has no key of its own."""
    stops = metadata.get(keys.STOPS)
    return frozenset(id_ for id_ in stops if type(id_) is int) if isinstance(stops, list) else frozenset()


def _pieces(outputs: NDArray[np.int8], most: int) -> Iterator[tuple[int, int]]:
    """Cut 0..len(outputs) into pieces of at most `BATCH` tokens, of which at most `most` have `outputs` 1."""
    so_far = np.concatenate([[0], np.cumsum(outputs, dtype=np.int64)])
    start = 0
    while start < len(outputs):
        # the largest `stop` with at most `most` outputs before it
        stop = int(np.searchsorted(so_far, so_far[start] + most, side="right")) - 1
        stop = min(stop, start + BATCH, len(outputs))
        yield start, stop
        start = stop


def _read_checked(path: Path) -> reader.GgufFile:
    """Check the file with our own reader: llama.cpp may crash on a damaged file."""
    file = reader.read(path)
    if not file.tensors:
        raise RuntimeProblem(f"{path} has a vocabulary but no tensors", "Give the file of a whole model")
    return file


@cache
def _can_use_extra_buffers() -> bool:
    """Whether llama.cpp's extra buffer types are safe: they use AMX, which faults on some virtual machines."""
    probe = edgetune_native.probe_amx()
    if probe.usable or not probe.advertised:
        return True
    notice = RuntimeNotice(f"{probe.reason}; running without AMX and without llama.cpp's repacked weights")
    warnings.warn(notice, stacklevel=2)
    return False
