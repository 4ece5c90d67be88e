"""One decoder in a process of its own, for bench_onnx: `python contestants.py LIBRARY MODEL THREADS CONTEXT`.

It says "ready" when the model is open, and then answers each line "PROMPT TOKENS" of its input with the seconds of the
prompt (first token included) and of each further token, greedily chosen. Imports of a library stay in its class: the
peers run in another environment, where edgetune is not installed. `threads` 0 leaves the choice to the library.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class Contestant(Protocol):
    def generate(self, prompt: Tokens, count: int) -> Iterator[int]:
        """Greedy tokens after a prompt, each as soon as it is known; nothing is kept from one call to the next."""


class Edgetune:
    """Whatever edgetune.runtime opens."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        runtime = importlib.import_module("edgetune.runtime")
        self._greedy = runtime.Sampling()
        self._runtime = runtime.load(Path(path), threads=threads or None, context=context)

    def generate(self, prompt: Tokens, count: int) -> Iterator[int]:
        return iter(self._runtime.generate(prompt.tolist(), self._greedy, count))


class Genai:
    """onnxruntime-genai's own loop."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._library = importlib.import_module("onnxruntime_genai")
        config = self._library.Config(path)
        if threads:
            options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            config.overlay(json.dumps(options))
        self._model = self._library.Model(config)
        self._context = context

    def generate(self, prompt: Tokens, count: int) -> Iterator[int]:
        parameters = self._library.GeneratorParams(self._model)
        length = len(prompt) + count
        parameters.set_search_options(max_length=self._context, min_length=length + 1, do_sample=False)
        generator = self._library.Generator(self._model, parameters)
        generator.append_tokens(prompt)
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


class LlamaCpp:
    """llama.cpp by its C functions, with its own greedy sampler."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._library = library = importlib.import_module("llama_cpp")
        self._silent = library.llama_log_callback(lambda *_: None)  # kept, as C keeps it
        library.llama_log_set(self._silent, None)
        library.llama_backend_init()
        parameters = library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        if threads:
            parameters.n_threads = parameters.n_threads_batch = threads
        model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
        self._context: Any = library.llama_init_from_model(model, parameters)
        self._sampler = library.llama_sampler_init_greedy()

    def generate(self, prompt: Tokens, count: int) -> Iterator[int]:
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        tokens = (library.llama_token * len(prompt))(*prompt.tolist())
        for _ in range(count):
            library.llama_decode(self._context, library.llama_batch_get_one(tokens, len(tokens)))
            token = library.llama_sampler_sample(self._sampler, self._context, -1)
            yield token
            tokens = (library.llama_token * 1)(token)


LIBRARIES: dict[str, type[Any]] = {"edgetune": Edgetune, "onnxruntime-genai": Genai, "llama.cpp": LlamaCpp}


def _seconds(contestant: Contestant, prompt: Tokens, count: int) -> list[float]:
    found, begin = [], time.perf_counter()
    for _ in contestant.generate(prompt, count):
        end = time.perf_counter()
        found.append(end - begin)
        begin = end
    return found


def main() -> None:
    """Answer until the input ends."""
    library, path, threads, context = sys.argv[1:]
    contestant = LIBRARIES[library](path, int(threads), int(context))
    print("ready", flush=True)
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        length, count = map(int, line.split())
        print(*_seconds(contestant, rng.integers(5, 1000, length, np.int32), count), flush=True)


if __name__ == "__main__":
    main()
