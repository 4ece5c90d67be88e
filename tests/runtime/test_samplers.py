"""Each sampler gives the tokens of llama.cpp's own, in a chain that is written down here once more."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime import Sampling, load
from edgetune.runtime.llama_library import library
from edgetune.runtime.sampling import Sampler, SamplerVocabulary

V, CONTEXT, STEPS = 523, 200, 60
lib: Any = library()


def dry(vocab: Any, breakers: list[bytes] | None = None) -> Any:
    texts = [b"\n", b":", b'"', b"*"] if breakers is None else breakers
    return lib.llama_sampler_init_dry(vocab, 2.0, 1.5, 1, CONTEXT, (ctypes.c_char_p * len(texts))(*texts), len(texts))


def bias(*pairs: tuple[int, float]) -> Any:
    return lib.llama_sampler_init_logit_bias(V, len(pairs), (lib.llama_logit_bias * len(pairs))(*pairs))


Chain = Callable[[Any], list[Any]]
CASES: dict[str, tuple[Sampling, Chain]] = {
    "temperature": (
        Sampling(0.7, seed=3),
        lambda v: [lib.llama_sampler_init_temp(0.7), lib.llama_sampler_init_dist(3)],
    ),
    "top_k": (
        Sampling(1.5, top_k=7, seed=3),
        lambda v: [
            lib.llama_sampler_init_top_k(7), lib.llama_sampler_init_temp(1.5), lib.llama_sampler_init_dist(3),
        ],
    ),
    "top_p": (
        Sampling(1.5, top_p=0.8, seed=4),
        lambda v: [
            lib.llama_sampler_init_top_p(0.8, 1), lib.llama_sampler_init_temp(1.5), lib.llama_sampler_init_dist(4),
        ],
    ),
    "min_p": (
        Sampling(1.5, min_p=0.2, seed=5),
        lambda v: [
            lib.llama_sampler_init_min_p(0.2, 1), lib.llama_sampler_init_temp(1.5), lib.llama_sampler_init_dist(5),
        ],
    ),
    "typical": (
        Sampling(1.5, typical_p=0.4, seed=6),
        lambda v: [
            lib.llama_sampler_init_typical(0.4, 1), lib.llama_sampler_init_temp(1.5), lib.llama_sampler_init_dist(6),
        ],
    ),
    "penalties": (
        Sampling(0, repeat_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.5, repeat_last_n=20),
        lambda v: [lib.llama_sampler_init_penalties(V, 20, 1.4, 0.5, 0.3), lib.llama_sampler_init_greedy()],
    ),
    "penalties of the whole context": (
        Sampling(0.9, repeat_penalty=1.4, repeat_last_n=-1, seed=7),
        lambda v: [
            lib.llama_sampler_init_penalties(V, CONTEXT, 1.4, 0, 0),
            lib.llama_sampler_init_temp(0.9), lib.llama_sampler_init_dist(7),
        ],
    ),
    "dry": (
        Sampling(0, dry_multiplier=2, dry_base=1.5, dry_allowed_length=1),
        lambda v: [dry(v), lib.llama_sampler_init_greedy()],
    ),
    "xtc": (
        Sampling(1.2, xtc_probability=0.5, xtc_threshold=0.05, seed=8),
        lambda v: [
            lib.llama_sampler_init_xtc(0.5, 0.05, 1, 8), lib.llama_sampler_init_temp(1.2),
            lib.llama_sampler_init_dist(8),
        ],
    ),
    "mirostat 1": (
        Sampling(1.1, mirostat=1, mirostat_tau=3, mirostat_eta=0.2, seed=9),
        lambda v: [lib.llama_sampler_init_temp(1.1), lib.llama_sampler_init_mirostat(V, 9, 3, 0.2, 100)],
    ),
    "mirostat 2": (
        Sampling(1.1, mirostat=2, mirostat_tau=3, mirostat_eta=0.2, seed=9),
        lambda v: [lib.llama_sampler_init_temp(1.1), lib.llama_sampler_init_mirostat_v2(9, 3, 0.2)],
    ),
    "logit_bias": (
        Sampling(0, logit_bias={3: 40.0, 500: 39.9, 7: -math.inf}),
        lambda v: [bias((3, 40.0), (500, 39.9), (7, -math.inf)), lib.llama_sampler_init_greedy()],
    ),
    "all": (
        Sampling(
            0.8, 40, 0.95, 0.02, 11, {5: 2.0}, 1.1, 0.1, 0.2, 30, 2, 1.5, 1, typical_p=0.9, xtc_probability=0.3,
            xtc_threshold=0.1,
        ),
        lambda v: [
            bias((5, 2.0)), lib.llama_sampler_init_penalties(V, 30, 1.1, 0.2, 0.1), dry(v),
            lib.llama_sampler_init_top_k(40), lib.llama_sampler_init_typical(0.9, 1),
            lib.llama_sampler_init_top_p(0.95, 1), lib.llama_sampler_init_min_p(0.02, 1),
            lib.llama_sampler_init_xtc(0.3, 0.1, 1, 11), lib.llama_sampler_init_temp(0.8),
            lib.llama_sampler_init_dist(11),
        ],
    ),
}  # fmt: skip


def random_logits() -> NDArray[np.float32]:
    """[STEPS, V], with a few tokens that are likely all the time, so that there are repetitions."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (STEPS, V)).astype(np.float32)
    logits[:, 100:106] += 6
    return logits


def chosen_by_llama(samplers: list[Any], prompt: list[int], logits: NDArray[np.float32]) -> list[int]:
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for sampler in samplers:
        lib.llama_sampler_chain_add(chain, sampler)
    for token in prompt:
        lib.llama_sampler_accept(chain, token)
    found = []
    for row in logits:
        data = (lib.llama_token_data * V)(*((id_, float(value), 0.0) for id_, value in enumerate(row)))
        candidates = lib.llama_token_data_array(data, V, -1, False)
        lib.llama_sampler_apply(chain, candidates)
        found.append(int(candidates.data[candidates.selected].id))
        lib.llama_sampler_accept(chain, found[-1])
    lib.llama_sampler_free(chain)
    return found


def chosen(sampling: Sampling, vocabulary: SamplerVocabulary, prompt: list[int]) -> list[int]:
    sampler = Sampler(sampling, vocabulary)
    sampler.accept_prompt(prompt)
    found = [sampler.choose(logits) for logits in random_logits()]
    sampler.close()
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_sampler_gives_the_tokens_of_llama_cpp(file: Path, case: str) -> None:
    sampling, chain = CASES[case]
    prompt = [101, 102, 103, 9, 101, 102]
    with load(file, context=CONTEXT) as runtime:
        vocabulary = runtime.sampler_vocabulary
        assert vocabulary.size == V
        expected = chosen_by_llama(chain(vocabulary.pointer), prompt, random_logits())
        assert chosen(sampling, vocabulary, prompt) == expected
    greedy = random_logits().argmax(axis=1).tolist()
    assert expected != greedy, "the sampler changes nothing here"


def test_dry_stops_at_its_breakers_without_llama_cpps_vocabulary(file: Path) -> None:
    """As an ONNX model has it: the token of a breaker is found by its bytes."""
    texts = {103: b"a\n", 104: b":"}
    with load(file, context=CONTEXT) as runtime:
        vocabulary = runtime.sampler_vocabulary
        newline = [id_ for id_ in range(V) if b"\n" in runtime.token_bytes(id_)]
        prompt = [101, 102, newline[0], 105, 101, 102]
        breaks = Sampling(0, dry_multiplier=2, dry_base=1.5, dry_allowed_length=1, dry_breakers=("\n",))
        expected = chosen_by_llama(
            [dry(vocabulary.pointer, [b"\n"]), lib.llama_sampler_init_greedy()], prompt, random_logits()
        )
        assert chosen(breaks, vocabulary._replace(pointer=None), prompt) == expected
    apart = SamplerVocabulary(V, CONTEXT, lambda id_: texts.get(id_, b"x"))
    plain = Sampling(0, dry_multiplier=2, dry_base=1.5, dry_allowed_length=1, dry_breakers=())
    broken = Sampling(0, dry_multiplier=2, dry_base=1.5, dry_allowed_length=1)
    assert chosen(plain, apart, [101, 102]) != chosen(broken, apart, [101, 102])
    with pytest.raises(RuntimeProblem, match="one ASCII character"):
        Sampler(Sampling(0, dry_multiplier=2, dry_breakers=("ab",)), apart)


def test_a_mask_excludes_tokens(file: Path) -> None:
    mask = np.zeros(V, bool)
    mask[[7, 9]] = True
    with load(file) as runtime:
        for sampling in (Sampling(), Sampling(5.0, seed=1), Sampling(1.0, top_k=3, seed=1)):
            sampler = Sampler(sampling, runtime.sampler_vocabulary)
            assert {sampler.choose(logits, mask) for logits in random_logits()} == {7, 9}
            sampler.close()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"), ({"temperature": math.nan}, "temperature"), ({"top_p": 1.5}, "top_p"),
    ({"top_k": -3}, "top_k"), ({"top_k": 1.5}, "top_k"), ({"seed": -1}, "seed"), ({"seed": 2**32 - 1}, "seed"),
    ({"repeat_penalty": 0}, "repeat_penalty"), ({"logit_bias": {V: 1.0}}, "logit_bias"),
    ({"logit_bias": {1: math.nan}}, "logit_bias"), ({"mirostat": 3}, "mirostat"),
    ({"mirostat": 2, "temperature": 1, "top_k": 5}, "top_k"), ({"mirostat": 1}, "temperature"),
    ({"dry_last_n": -2}, "dry_last_n"), ({"presence_penalty": math.inf}, "presence_penalty"),
    ({"min_p": "much"}, "min_p"), ({"top_p": True}, "top_p"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "named"), BAD, ids=str)
def test_a_value_out_of_range_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(RuntimeProblem, match=named):
        Sampling(**values).check(V)
