"""Time the runtime beside raw llama_decode, llama-cpp-python and llama-bench, in turn in one process.

Everything runs on one thread unless --threads says otherwise. Times are those of the processor where that is one
thread, and the fastest of several rounds counts, so that other processes weigh less.

    python -m tests.bench.bench_runtime [--threads N] [--model FILE --stock]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import edgetune_native
from edgetune.config import load_config
from edgetune.planning.prepare import prepare_run
from edgetune.runtime import GenerationRequest, Runtime, Ticket, Usage, load
from edgetune.runtime.engine import Engine
from edgetune.runtime.llama.context import LlamaContext
from edgetune.runtime.llama.runtime import LlamaRuntime
from edgetune.runtime.llama.self_test import MATRICES, METADATA
from edgetune.runtime.machine_fit import MachineFit
from edgetune.runtime.ngrams import Answers, NgramTable, path_beside
from edgetune.runtime.probing import measure_costs
from edgetune.runtime.slots import NO_SPECULATION, Speculation
from edgetune_converters.gguf import reader
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.gguf.values import f32s, i32s, strings, u32
from edgetune_converters.gguf.writer import GgufWriter
from tests.bench import llama_programs

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples/smart-home"
VOCABULARY, WIDTH = 32_000, 64
ROUNDS = 7
TOKENS = 200


def toy_model(path: Path) -> Path:
    """Write a model of one small layer with a vocabulary of 32,000."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"word{index}" for index in range(VOCABULARY - len(names))]
    metadata = {
        **METADATA, "llama.context_length": u32(1024), "llama.embedding_length": u32(WIDTH),
        "llama.feed_forward_length": u32(WIDTH), "llama.attention.head_count": u32(2),
        "tokenizer.ggml.tokens": strings(names),
        "tokenizer.ggml.scores": f32s([0.0] * VOCABULARY),
        "tokenizer.ggml.token_type": i32s([3] * 3 + [6] * 256 + [1] * (VOCABULARY - 259)),
    }  # fmt: skip
    random = np.random.default_rng(1)
    shapes = {f"{name}.weight": (VOCABULARY, WIDTH) for name in ("token_embd", "output")}
    shapes |= {f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in MATRICES}
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    specs = [TensorSpec(name, shape, BY_NAME["q8_0"]) for name, shape in shapes.items()]
    specs += [TensorSpec(name, (WIDTH,), BY_NAME["f32"]) for name in norms]
    with GgufWriter.open(path, metadata, specs) as writer:
        for shape in shapes.values():
            writer.append(edgetune_native.quantize(random.normal(0, 1, shape).astype(np.float32), "q8_0"))
        for _ in norms:
            writer.append(np.full(WIDTH, 0.2, np.float32))
        writer.publish()
    return path


def decode_alone(context: LlamaContext, ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> float:
    """Return the seconds of raw llama_decode for each token of a continuation."""
    library, batch = context._library, context._batch
    context.begin()
    context.decode(ids, 0, np.zeros(len(ids), np.int8))
    batch.n_tokens, batch.logits[0] = 1, 1
    start = time.process_time()
    for position in range(len(ids), len(ids) + TOKENS):
        batch.token[0], batch.pos[0] = 300 + position, position
        library.llama_decode(context._context, batch)
        library.llama_synchronize(context._context)
    return (time.process_time() - start) / TOKENS


def decode_in_engine(engine: Engine, ids: list[int]) -> float:
    """Return the seconds of each token of an answer of an engine."""
    ticket = engine.submit(GenerationRequest(ids, max_tokens=TOKENS + 1, ignore_eos=True))
    next(ticket)
    start = time.process_time()
    count = sum(1 for _ in ticket)
    return (time.process_time() - start) / count


def decode_in_llama_cpp_python(path: Path, threads: int, ids: list[int]) -> Callable[[], float]:
    """Return a function that returns the seconds of each token of llama-cpp-python's generator."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=1024, n_threads=threads, verbose=False)

    def work() -> float:
        model.reset()
        found = model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        next(found)
        start = time.process_time()
        for _ in range(TOKENS):
            next(found)
        return (time.process_time() - start) / TOKENS

    return work


def bench_overhead(path: Path, threads: int) -> None:
    """Print the overhead per token over raw llama_decode, of an engine and of llama-cpp-python."""
    ids = [300 + index for index in range(16)]
    runtime = LlamaRuntime(path, threads=threads, context=1024)
    peer = decode_in_llama_cpp_python(path, threads, ids)
    with runtime, Engine(runtime, slots=1) as engine:
        array = np.array(ids, np.int32)
        raw, ours, theirs = np.inf, np.inf, np.inf
        for _ in range(ROUNDS):  # in turn
            raw = min(raw, decode_alone(runtime._open(), array))
            ours = min(ours, decode_in_engine(engine, ids))
            theirs = min(theirs, peer())
    print(f"token of a toy model with a vocabulary of 32,000, raw llama_decode: {raw * 1e6:.0f} us")
    print(f"  overhead of Engine:           {(ours - raw) * 1e6:7.1f} us")
    print(f"  overhead of llama-cpp-python: {(theirs - raw) * 1e6:7.1f} us")


def bench_scores(path: Path, threads: int) -> None:
    """Print the time of the logits of a row of 512 tokens, relative to raw llama_decode with as many outputs."""
    with LlamaRuntime(path, threads=threads, context=1024) as runtime:
        ids = np.resize(np.arange(300, 1300, dtype=np.int32), 512)
        positions = np.arange(1, 512)
        outputs = np.ones(511, np.int8)

        def raw() -> float:
            context = runtime._open()
            start = time.perf_counter()
            context.begin()
            context.decode(ids[:511], 0, outputs)
            return time.perf_counter() - start

        def scored() -> float:
            start = time.perf_counter()
            for _ in runtime.score(ids, positions):
                pass
            return time.perf_counter() - start

        pairs = [(raw(), scored()) for _ in range(ROUNDS)]
    alone, ours = (min(each) for each in zip(*pairs, strict=True))
    print(f"logits of a row of 512 tokens: {ours * 1e3:.1f} ms, {ours / alone:.3f}x raw llama_decode")


class Answered(NamedTuple):
    """Answers to all prompts, and what they cost."""

    seconds: float
    answers: list[list[int]]
    usages: list[Usage]
    drafted: int


def answer_all(runtime: Runtime, speculation: Speculation, prompts: list[list[int]], most: int) -> Answered:
    """Answer prompts one after another, in processor time."""
    with Engine(runtime, slots=1, speculation=speculation) as engine:
        start = time.process_time()
        tickets: list[Ticket] = []
        answers = []
        for ids in prompts:
            tickets.append(engine.submit(GenerationRequest(ids, max_tokens=most)))
            answers.append([event.token for event in tickets[-1]])
        seconds = time.process_time() - start
        return Answered(seconds, answers, [ticket.usage for ticket in tickets], engine.status.drafted_tokens)


def bench_speculation(threads: int, rows: int) -> None:
    """Print what the table of the smart-home sample's training answers saves on its test rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(SAMPLE / "smart-home-q4_k_m.gguf", folder))
        table = NgramTable.count(Answers.of(prepare_run(load_config(SAMPLE / "config.yaml")).train.rows))
        assert table is not None
        tokens = reader.read(path).metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, list)
        table.for_vocabulary(map(str, tokens)).write(path_beside(path))
        costs = measure_costs(path, MachineFit(threads)).costs
        lines = (SAMPLE / "data/test.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        with load(path, threads=threads) as runtime:
            prompts = [runtime.tokenize_chat(json.loads(line)["messages"][:-1]) for line in lines]
            best: dict[bool, float] = {False: np.inf, True: np.inf}
            found = {}
            for _ in range(3):
                for guesses, speculation in ((False, NO_SPECULATION), (True, Speculation(costs=costs))):
                    first = answer_all(runtime, speculation, prompts, 1)
                    found[guesses] = answer_all(runtime, speculation, prompts, 80)
                    best[guesses] = min(best[guesses], found[guesses].seconds - first.seconds)
    answers = {guesses: each.answers for guesses, each in found.items()}
    usages, drafted = found[True].usages, found[True].drafted
    right, count = sum(usage.guessed_tokens for usage in usages), sum(usage.generated_tokens for usage in usages)
    differ = sum(one != other for one, other in zip(answers[False], answers[True], strict=True))
    print(f"speculation on {len(prompts)} rows of smart-home: {best[False] / best[True]:.2f}x;")
    print(f"  {right} of {count} tokens guessed, {right / max(drafted, 1):.0%} of {drafted} drafted ones right")
    print(f"  batches of 1, 2, 4, 8, 16, 32 rows cost {costs}")
    print(f"  {differ} answers differ, {sum(usage.near_ties for usage in usages)} near ties")


def bench_against_llama_bench(path: Path, threads: int, program: str) -> None:
    """Print tokens per second of a prompt of 512 tokens, and of 64 tokens behind it, beside llama-bench's, in turn."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with LlamaRuntime(path, threads=threads, context=1024) as runtime, Engine(runtime, slots=1) as engine:

        def usage() -> tuple[float, float]:
            ids = np.random.default_rng().integers(300, min(runtime.vocabulary_size, 30_000), 512).tolist()
            ticket = engine.submit(GenerationRequest(ids, max_tokens=65, ignore_eos=True, speculate=False))
            ticket.wait()
            return 512 / ticket.usage.prompt_seconds, 64 / ticket.usage.decode_seconds

        usage()
        for _ in range(3):
            theirs.append(
                (_llama_bench(program, path, threads, "512,0,0"), _llama_bench(program, path, threads, "0,64,512"))
            )
            ours.append(usage())
    for index, name in enumerate(("prompt", "answer")):
        our, their = (statistics.median(rate[index] for rate in rates) for rates in (ours, theirs))
        print(f"{name}: {our:.1f} tokens/s, {our / their:.3f}x llama-bench ({their:.1f})")


def _llama_bench(program: str, path: Path, threads: int, sizes: str) -> float:
    """Return llama-bench's tokens per second; sizes are prompt, answer, and tokens in the cache before."""
    prompt, answer, depth = sizes.split(",")
    options = ["-m", str(path), "-t", str(threads), "-p", prompt, "-n", answer, "-d", depth, "-o", "json", "-r", "1"]
    (found,) = json.loads(subprocess.run([program, *options], check=True, capture_output=True).stdout)
    return float(found["avg_ts"])


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=100, help="test rows of smart-home")
    parser.add_argument("--model", type=Path, help="GGUF file that llama-bench runs, too")
    parser.add_argument("--llama-bench", help="the program; --stock builds it from the pinned source distribution")
    parser.add_argument("--stock", action="store_true", help="build llama-bench, which takes minutes the first time")
    options = parser.parse_args()
    program = options.llama_bench or (str(llama_programs.program("llama-bench")) if options.stock else None)
    if options.model and program:  # first: OpenMP's threads wait in another way once two threads have used them
        bench_against_llama_bench(options.model, options.threads, program)
    else:
        print("beside llama-bench: left out; give --model FILE and --stock")
    with tempfile.TemporaryDirectory() as folder:
        toy = toy_model(Path(folder) / "toy.gguf")
        bench_overhead(toy, options.threads)
        bench_scores(toy, options.threads)
    bench_speculation(options.threads, options.rows)


if __name__ == "__main__":
    main()
