"""What every runtime must do: llama.cpp and ONNX Runtime on the same weights, against transformers and each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.runtime import Finish, NoChatTemplate, Runtime, RuntimeProblem, Sampling, load
from edgetune.runtime.artifacts import artifact_format
from tests.converters import tiny
from tests.runtime import models
from tests.runtime.scores import PROMPT, assert_same, scored

# llama.cpp keeps keys and values in f16; in ONNX all is f32
KLD = {"LlamaRuntime": 1e-5, "OnnxRuntime": 1e-8}


def test_scores_are_the_logits_of_transformers(base: Path, runtime: Runtime) -> None:
    ids = tiny.random_ids(200)
    expected = tiny.torch_logits(base, None, ids)[:-1]
    found = scored(runtime, ids, list(range(1, 200)))
    kld, same_top = tiny.divergence(expected, found)
    assert kld < KLD[type(runtime).__name__]
    assert same_top > 0.98
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_only_the_requested_positions_are_scored_in_order(runtime: Runtime) -> None:
    ids = tiny.random_ids(200)
    every = scored(runtime, ids, list(range(1, 200)))
    some = [3, 4, 50, 120, 199]
    assert_same(scored(runtime, ids, some), every[[p - 1 for p in some]])


def test_greedy_decoding_takes_the_argmax_of_transformers(base: Path, runtime: Runtime) -> None:
    ids = list(PROMPT)
    generation = runtime.generate(ids, Sampling(), 12)
    for token in generation:
        logits = tiny.torch_logits(base, None, ids)[-1]
        assert logits[token] > logits.max() - 1e-2
        ids.append(token)
    assert len(ids) == len(PROMPT) + 12
    assert generation.finish is Finish.LENGTH


def test_generation_does_not_depend_on_earlier_calls(runtime: Runtime) -> None:
    first = list(runtime.generate(PROMPT, Sampling(), 10))
    scored(runtime, tiny.random_ids(100, seed=9), [50, 99])
    assert list(runtime.generate(PROMPT, Sampling(), 10)) == first


def test_a_seed_makes_sampling_repeatable(runtime: Runtime) -> None:
    def sample(seed: int) -> list[int]:
        return list(
            runtime.generate(PROMPT, Sampling(temperature=1.5, top_k=100, top_p=0.99, min_p=0.001, seed=seed), 15)
        )

    assert sample(7) == sample(7)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=1, seed=1), Sampling(1.0, top_p=1e-6, seed=1), Sampling(1.0, min_p=1.0, seed=1)]
)
def test_each_filter_alone_can_leave_only_the_most_likely_token(runtime: Runtime, sampling: Sampling) -> None:
    assert list(runtime.generate(PROMPT, sampling, 8)) == list(runtime.generate(PROMPT, Sampling(), 8))


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(artifact: Path) -> None:
    with load(artifact) as runtime:
        plain = list(runtime.generate(PROMPT, Sampling(), 8))
        runtime.stop_tokens = frozenset({plain[5]})
        generation = runtime.generate(PROMPT, Sampling(), 8)
        assert list(generation) == plain[: plain.index(plain[5])]
        assert generation.finish is Finish.STOP


def test_a_full_context_ends_the_answer(artifact: Path) -> None:
    with load(artifact, context=24) as runtime:
        generation = runtime.generate(PROMPT, Sampling(), 100)
        assert len(list(generation)) == 24 - len(PROMPT) + 1  # the last one needs no room of its own
        assert generation.finish is Finish.CONTEXT


def test_a_prompt_longer_than_the_context_says_so(artifact: Path) -> None:
    with (
        load(artifact, context=16) as runtime,
        pytest.raises(RuntimeProblem, match=r"20 tokens.*context is 16") as error,
    ):
        runtime.generate(PROMPT, Sampling(), 4)
    assert "--context 24" in str(error.value.hint)


def test_ids_outside_the_vocabulary_never_reach_the_library(runtime: Runtime) -> None:
    with pytest.raises(RuntimeProblem, match="token 523 is outside"):
        runtime.generate([1, 523], Sampling(), 1)
    with pytest.raises(ValueError, match="not a token id"):
        runtime.token_bytes(-1)


def test_an_empty_prompt_is_an_error(runtime: Runtime) -> None:
    with pytest.raises(RuntimeProblem, match="empty"):
        runtime.generate([], Sampling(), 1)


def test_text_survives_tokens_and_back(runtime: Runtime) -> None:
    assert runtime.detokenize(runtime.tokenize(models.WORDS)) == models.WORDS
    assert runtime.detokenize(runtime.tokenize("<|im_start|>user\nhi<|im_end|>")) == "user\nhi"


def test_the_template_and_stops_come_from_the_artifact(runtime: Runtime) -> None:
    assert runtime.chat_template is not None
    assert runtime.chat_template.source == models.TEMPLATE
    assert runtime.chat_template.eos_token == "<|im_end|>"
    assert runtime.tokenize("<|im_end|>")[0] in runtime.stop_tokens


def test_a_closed_runtime_can_be_closed_again(artifact: Path) -> None:
    runtime = load(artifact)
    runtime.close()
    runtime.close()


def test_all_runtimes_tokenize_alike(artifacts: dict[str, Path]) -> None:
    texts = [models.WORDS, "<|im_start|>user\nhi<|im_end|>\n", "", " two  spaces", "e\u0301", "\x00"]
    runtimes = [load(path) for path in artifacts.values()]
    first, *others = runtimes
    for other in others:
        assert [other.tokenize(text) for text in texts] == [first.tokenize(text) for text in texts]
        for special in (False, True):
            every = range(first.vocabulary_size)
            assert [other.token_bytes(id_, special=special) for id_ in every] == [
                first.token_bytes(id_, special=special) for id_ in every
            ]
    for runtime in runtimes:
        runtime.close()


def test_all_runtimes_answer_alike(artifacts: dict[str, Path]) -> None:
    sampling = Sampling(temperature=1.5, top_k=3, top_p=0.99, min_p=0.001, seed=7)
    answers = set()
    for path in artifacts.values():
        with load(path) as runtime:
            answers.add(
                (tuple(runtime.generate(PROMPT, Sampling(), 10)), tuple(runtime.generate(PROMPT, sampling, 10)))
            )
    assert len(answers) == 1


def test_the_properties_of_the_artifact(base: Path, runtime: Runtime, artifact: Path) -> None:
    assert runtime.vocabulary_size == 523
    assert runtime.trained_context == 256
    assert not runtime.is_quantized
    assert runtime.size >= (base / "model.safetensors").stat().st_size - 20_000  # its header
    assert "edgetune.base.sha256" in runtime.metadata
    runtime.verify()


def test_a_lone_surrogate_is_tokenized(runtime: Runtime) -> None:
    assert runtime.tokenize("\ud800 alone")


# -- answers as text ---------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": models.WORDS}]


def test_a_chat_is_the_rendered_conversation_continued(runtime: Runtime) -> None:
    assert runtime.chat_template is not None
    text = runtime.chat_template.render(MESSAGES, add_generation_prompt=True)
    ids = runtime.tokenize(text)
    assert runtime.tokenize_chat(MESSAGES) == ids
    tokens = list(runtime.generate(ids, Sampling(), 12))
    answer = runtime.chat(MESSAGES, max_tokens=12)
    assert answer.finish is None
    assert answer.text() == runtime.detokenize(tokens) == runtime.complete(text, max_tokens=12).text()
    assert answer.tokens == tokens
    assert answer.finish is Finish.LENGTH


def test_the_pieces_of_an_answer_are_whole_characters_and_together_its_text(runtime: Runtime) -> None:
    sampling = Sampling(temperature=2, seed=3)
    answer = runtime.complete("dim the lights", sampling=sampling, max_tokens=60)
    first = next(answer)
    pieces = [first, *answer]
    assert all(pieces)
    assert "".join(pieces) == answer.text() == runtime.detokenize(answer.tokens)
    assert list(answer) == [], "an answer that is over stays so"


def test_an_answer_knows_how_long_it_took(runtime: Runtime) -> None:
    answer = runtime.complete("dim the lights", max_tokens=12)
    answer.text()
    timing = answer.timing
    assert timing.prompt_tokens == len(runtime.tokenize("dim the lights"))
    assert timing.tokens == 12
    assert timing.prompt_seconds > 0
    assert timing.decode_seconds > 0
    assert timing.prompt_rate == timing.prompt_tokens / timing.prompt_seconds
    assert timing.decode_rate == 11 / timing.decode_seconds
    assert answer.timing == timing, "reading it again changes nothing"


def test_a_file_without_a_template_cannot_chat(runtime: Runtime) -> None:
    runtime.chat_template, runtime.template_names = None, ()
    with pytest.raises(NoChatTemplate, match="no chat template") as error:
        runtime.chat(MESSAGES)
    assert "Runtime.complete" in str(error.value.hint)


def test_no_tokens_are_asked_for_and_none_are_evaluated(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_prefill", None)
    generation = runtime.generate(PROMPT, Sampling(), 0)
    assert list(generation) == []
    assert generation.finish is Finish.LENGTH


def test_the_format_is_known_before_and_after_opening(runtime: Runtime, artifact: Path) -> None:
    assert runtime.format == artifact_format(artifact) == ("gguf" if artifact.suffix == ".gguf" else "onnx")


def test_an_input_that_the_model_lacks_cannot_be_bound(runtime: Runtime) -> None:
    with pytest.raises(RuntimeProblem, match="no input 'swapped'"):
        runtime.bind_input("swapped", np.zeros(3, bool))
