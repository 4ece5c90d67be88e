"""llama.cpp through its plain C face: logits, token ids and the real quantizer. Nothing of edgetune is used here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
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


def logits(path: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits after each token, [len(ids), vocabulary]; the cache is kept in f32 so that it adds no error."""
    with _model(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = 2
        context = llama_cpp.llama_init_from_model(model, params)
        try:
            return _forward(model, context, ids)
        finally:
            llama_cpp.llama_free(context)


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
    """Token ids of each text; `special` also adds BOS and EOS. Special tokens in the text are recognised."""
    with _model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokenize(vocab, text.encode(), special) for text in texts]


def _tokenize(vocab: Any, text: bytes, special: bool) -> list[int]:
    room = (ctypes.c_int32 * (len(text) + 8))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), special, True)
    assert count >= 0
    return list(room[:count])


def quantize(source: Path, target: Path, file_type: int) -> None:
    """llama-quantize's own code, from one GGUF file to another."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
