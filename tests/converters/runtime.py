"""llama.cpp through its C API: logits, token ids and the real quantizer. Nothing of edgetune is used here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


@contextmanager
def _model(path: Path, vocab_only: bool = False) -> Iterator[Any]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.use_extra_bufts = False  # some virtual machines advertise AMX and fault on it
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp does not load {path}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def logits(path: Path, ids: Sequence[int], lora: Path | None = None) -> NDArray[np.float32]:
    """Logits after each token, [len(ids), vocabulary]; the cache is f32 so that it adds no error.

    `lora` is a GGUF adapter that llama.cpp applies to the model.
    """
    with _model(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = 2
        context = llama_cpp.llama_init_from_model(model, params)
        try:
            if lora is not None:
                _apply(model, context, lora)
            return _forward(model, context, ids)
        finally:
            llama_cpp.llama_free(context)


def _apply(model: Any, context: Any, lora: Path) -> None:
    adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode())
    assert adapter, f"llama.cpp does not load {lora}"
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0


def _forward(model: Any, context: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.logits[position] = 1, 1
        batch.seq_id[position][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), width)).copy()
    llama_cpp.llama_batch_free(batch)
    return found


def token_ids(path: Path, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Token ids of each text; `special` also adds BOS and EOS. Special tokens in the text are recognized."""
    with _model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokenize(vocab, text.encode(), special) for text in texts]


def _tokenize(vocab: Any, text: bytes, special: bool) -> list[int]:
    room = (ctypes.c_int32 * (len(text) + 8))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), special, True)
    assert count >= 0
    return list(room[:count])


class Vocabulary:
    """The vocabulary of a file, loaded once for many texts."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp does not load {path}"
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def ids(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; special tokens in the text are recognized."""
        return _tokenize(self._vocab, text.encode(), False)

    def text(self, ids: Sequence[int]) -> bytes:
        """The bytes of some tokens, including special ones."""
        room = ctypes.create_string_buffer(256)
        lengths = (llama_cpp.llama_token_to_piece(self._vocab, id_, room, len(room), 0, True) for id_ in ids)
        return b"".join(room.raw[:length] for length in lengths)


class _TypeOverride(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


def _array(kind: Any, entries: Sequence[tuple[Any, ...]]) -> Any:
    """A C array that ends with an entry of zeros."""
    return (kind * (len(entries) + 1))(*entries)


def quantize(
    source: Path,
    target: Path,
    file_type: int,
    *,
    tensor_types: Sequence[tuple[str, int]] = (),
    output_type: int | None = None,
    embedding_type: int | None = None,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
) -> None:
    """Run llama-quantize's code from one GGUF file to another; types are ggml's numbers."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 2
    overrides = _array(_TypeOverride, [(name.encode(), kind) for name, kind in tensor_types])
    if tensor_types:
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    if output_type is not None:
        params.output_tensor_type = output_type
    if embedding_type is not None:
        params.token_embedding_type = embedding_type
    floats = ctypes.POINTER(ctypes.c_float)
    entries = [(name.encode(), data.ctypes.data_as(floats), data.size) for name, data in (imatrix or {}).items()]
    importance = _array(_Importance, entries)
    if entries:
        params.imatrix = ctypes.cast(importance, type(params.imatrix))
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
