"""A context of llama.cpp: a key-value cache, a batch that is reused for every call, and the logits of the last call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime.interrupts import InterruptFlag
from edgetune.runtime.llama_library import collecting_errors, library
from edgetune.runtime.slots import LoadedAdapter

BATCH = 512  # tokens per forward pass; llama.cpp's own default for the physical batch
_NO_ROOM, _ABORTED = 1, 2  # llama_decode, llama.h
_NO_POOLING = 0  # llama.h: the hidden state of each token
_CELLS = 256
_Q8_0 = 8  # enum ggml_type, ggml.h
F32 = NDArray[np.float32]


def round_up_cells(cells: int) -> int:
    """Return the cells that llama.cpp allocates for one of several sequences: a multiple of 256."""
    return -(-cells // _CELLS) * _CELLS


class Prefix(Protocol):
    """What stands in the cache before every text."""

    length: int
    """Its number of tokens."""

    def put(self, context: LlamaContext, sequence: int) -> None:
        """Write it to the empty cache of a sequence, at the positions 0 to `length` - 1."""


class LlamaContext:
    """`cells` tokens of each of `sequences` sequences; at most `outputs` rows of logits [vocabulary_size] a call.

    Positions are those of a text: the prefix, if there is one, comes before position 0.

    Unless `is_unified` is set, each sequence has its own cache. In a shared one, the order of the sums in a sequence's
    attention, and with f16 their result, depends on the other sequences.
    """

    _batch: Any = None
    _context: Any = None

    def __init__(
        self, model: Any, path: Path, *, vocabulary_size: int, threads: int, cells: int, outputs: int,
        sequences: int = 1, prefix: Prefix | None = None, hidden_rows: int = 0, is_unified: bool = False,
        for_states: bool = False, flash_attention: bool | None = None, physical_batch: int = BATCH,
        quantizes_cache: bool = False, on_tensor: Any = None,
    ) -> None:  # fmt: skip
        """Create the context.

        Args:
            model: The model of llama.cpp.
            path: Its file, for messages.
            vocabulary_size: Width of the logits that are returned.
            threads: Threads of a call.
            cells: Tokens of a text.
            outputs: Rows of logits of a call.
            sequences: Sequences at a time.
            prefix: What stands before every text.
            hidden_rows: Rows of the vocabulary behind `vocabulary_size`, whose logits are not returned.
            is_unified: Whether the sequences share one cache.
            for_states: Compute hidden states (`last_state`) in place of logits.

            flash_attention: Whether attention is one fused operation; None: as llama.cpp chooses.
            quantizes_cache: Whether keys and values are in q8_0 in place of f16.
            physical_batch: Tokens that are evaluated at once, at most `BATCH`.
            on_tensor: Callback that is shown the results of operations (`ActivationCollector.callback`).

        Raises:
            RuntimeProblem: llama.cpp cannot allocate it.
        """
        self._library, self._path, self._vocabulary_size = library(), path, vocabulary_size
        self._hidden_rows, self._prefix = hidden_rows, prefix
        self.shows_hidden_rows = False
        """Whether `logits` returns those of the hidden rows too."""
        self._offset = prefix.length if prefix else 0
        cells += self._offset
        self._has_several = sequences > 1
        self._flag: InterruptFlag | None = InterruptFlag()
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = cells if sequences == 1 else sequences * round_up_cells(cells)
        parameters.n_batch, parameters.n_ubatch = BATCH, physical_batch
        if quantizes_cache:
            parameters.type_k = parameters.type_v = _Q8_0
        if flash_attention is not None:
            parameters.flash_attn_type = int(flash_attention)
        parameters.n_outputs_max = outputs
        parameters.n_seq_max = sequences
        parameters.kv_unified = is_unified
        parameters.n_threads = parameters.n_threads_batch = threads
        if on_tensor is not None:
            parameters.cb_eval = on_tensor
        if for_states:
            parameters.embeddings, parameters.pooling_type = True, _NO_POOLING
        parameters.abort_callback = self._flag.callback(self._library.ggml_abort_callback)
        parameters.abort_callback_data = self._flag.data
        with collecting_errors() as errors:
            self._context = self._library.llama_init_from_model(model, parameters)
        if self._context is None:
            self.close()
            raise RuntimeProblem(
                f"llama.cpp cannot create a context of {cells} tokens: {errors.cause}", "Ask for less with --context"
            )
        self._memory: Any = self._library.llama_get_memory(self._context)
        self._make_batch()

    def _make_batch(self) -> None:
        self._batch = batch = self._library.llama_batch_init(BATCH, 0, 1)
        self._tokens = np.ctypeslib.as_array(batch.token, (BATCH,))
        self._positions = np.ctypeslib.as_array(batch.pos, (BATCH,))
        self._outputs = np.ctypeslib.as_array(batch.logits, (BATCH,))
        np.ctypeslib.as_array(batch.n_seq_id, (BATCH,))[:] = 1
        for i in range(BATCH):
            batch.seq_id[i][0] = 0

    @property
    def address(self) -> int:
        """The address of the llama_context."""
        return int(self._context)

    @property
    def stop_address(self) -> int:
        """The address of the byte that ends a call when it is not 0."""
        return self._interrupts.data

    @property
    def offset(self) -> int:
        """Tokens of the prefix."""
        return self._offset

    def resume(self) -> None:
        """Clear the byte that ends a call."""
        self._interrupts.clear()

    def set_adapters(self, adapters: Sequence[tuple[LoadedAdapter, float]]) -> None:
        """Add the weighted changes of adapters to the model in all further calls."""
        count = len(adapters)
        pointers = (self._library.llama_adapter_lora_p_ctypes * count)(*(each.pointer for each, _ in adapters))
        weights = (ctypes.c_float * count)(*(weight for _, weight in adapters))
        self._library.llama_set_adapters_lora(self._context, pointers, count, weights)

    def begin(self, sequence: int = 0) -> None:
        """Drop the keys and values of a sequence and put the prefix into its cache."""
        self.clear_cache(sequence)
        if self._prefix:
            self._prefix.put(self, sequence)

    def clear_cache(self, sequence: int) -> None:
        """Drop the keys and values of a sequence."""
        self.clear(sequence if self._has_several else None)

    def saved_state(self, sequence: int) -> bytes:
        """Return the cache of a sequence as llama.cpp saves it."""
        size = self._library.llama_state_seq_get_size(self._context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = self._library.llama_state_seq_get_data(self._context, buffer, size, sequence)
        return bytes(buffer)[:written]

    def load_state(self, state: bytes, sequence: int) -> None:
        """Load a saved cache into a sequence. Raises RuntimeProblem if llama.cpp refuses it."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self._library.llama_state_seq_set_data(self._context, buffer, len(state), sequence):
            raise RuntimeProblem(f"llama.cpp refuses the prefix of {self._path}", "Export the model again")

    def clear(self, sequence: int | None = None) -> None:
        """Drop the keys and values of one sequence, or of all."""
        if sequence is None:
            self._library.llama_memory_clear(self._memory, False)
        else:
            self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def cut(self, position: int) -> bool:
        """Drop the keys and values of sequence 0 from a position on; return whether that was possible."""
        return bool(self._library.llama_memory_seq_rm(self._memory, 0, position + self._offset, -1))

    def decode(self, ids: NDArray[np.int32], start: int, outputs: NDArray[np.int8], sequence: int = 0) -> None:
        """Evaluate ids [n <= BATCH] of a sequence from position `start`; compute logits where `outputs` [n] is 1."""
        self.decode_at(ids, start + self._offset, outputs, sequence)

    def decode_at(self, ids: NDArray[np.int32], start: int, outputs: NDArray[np.int8], sequence: int = 0) -> None:
        """As `decode`, at a position of the cache: the prefix begins at 0."""
        count = len(ids)
        self._batch.n_tokens = count
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(start, start + count)
        self._outputs[:count] = outputs
        for index in range(count if self._has_several else 0):
            self._batch.seq_id[index][0] = sequence
        while True:
            with self._interrupts.watching():
                status = self._library.llama_decode(self._context, self._batch)
            if status != _ABORTED:  # a KeyboardInterrupt is raised before we get here
                break
            self._library.llama_memory_seq_rm(self._memory, sequence, start, -1)  # a handled signal: evaluate again
        if status:
            raise self._failure(start, status)

    def step(self, token: int, position: int) -> F32:
        """Append one token to sequence 0 and return the logits [V] after it. The hot path of generation."""
        batch = self._batch
        batch.n_tokens = 1
        batch.token[0] = token
        batch.pos[0] = position + self._offset
        batch.logits[0] = 1
        self._interrupts.clear()
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise self._failure(position, status)
        logits: F32 = self.logits(1)[0]
        return logits

    def step_together(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> F32:
        """Append one token to each of `sequences` and return the logits [n, V] after them."""
        count = len(tokens)
        self._batch.n_tokens = count
        self._tokens[:count], self._positions[:count], self._outputs[:count] = tokens, positions, 1
        self._positions[:count] += self._offset
        for index, sequence in enumerate(sequences):
            self._batch.seq_id[index][0] = sequence
        self._interrupts.clear()
        status = self._library.llama_decode(self._context, self._batch)
        if status:
            raise self._failure(max(positions), status)
        return self.logits(count)

    def logits(self, count: int) -> F32:
        """Return the logits [count, V] of the last call, a view of llama.cpp's buffer where no row is hidden."""
        pointer = self._library.llama_get_logits(self._context)
        whole = np.ctypeslib.as_array(pointer, (count, self._vocabulary_size + self._hidden_rows))
        is_cut = self._hidden_rows and not self.shows_hidden_rows
        return np.ascontiguousarray(whole[:, : self._vocabulary_size]) if is_cut else whole

    def last_state(self, width: int) -> F32:
        """Return the hidden state [width] of the last token of the last call, behind the final norm."""
        pointer = self._library.llama_get_embeddings_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (width,)).copy()

    @property
    def _interrupts(self) -> InterruptFlag:
        assert self._flag is not None, "the context has been closed"
        return self._flag

    def _failure(self, position: int, status: int) -> RuntimeProblem:
        reason = "there is no room in its context" if status == _NO_ROOM else f"status {status}"
        return RuntimeProblem(f"llama.cpp stopped at token {position} of {self._path}: {reason}")

    def close(self) -> None:
        """Free batch and context. Idempotent."""
        for name, free in {"_batch": "llama_batch_free", "_context": "llama_free"}.items():
            if (resource := getattr(self, name)) is not None:
                setattr(self, name, None)
                getattr(self._library, free)(resource)
        if self._flag is not None:
            self._flag.close()
            self._flag = None
