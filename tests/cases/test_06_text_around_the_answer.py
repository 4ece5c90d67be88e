"""What a template writes around an answer is no part of it: in task scores, choices, greedy answers and `run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.config import load_config
from edgetune.data.answer_frame import AnswerFrame, AnswerReader, Part, TextPiece, find_frame, read_answer
from edgetune.data.chat import ChatTemplate
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import load
from edgetune.validation import greedy, task
from edgetune.validation.choices import continuations
from tests.cases import learnable
from tests.cli_runner import edgetune
from tests.data import templates

ASK = [{"role": "user", "content": "lamp 73 green?"}]
STOPS = ("<|im_end|>", "</s>", "<|return|>")
OPEN = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
TURN = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
# an empty thought in the answer to the last question, as templates of models that think have it
THINKING = (
    "{%- set last = namespace(question=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}"
    + TURN
    + "{%- if message.role == 'assistant' and loop.index0 > last.question %}"
    "{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}" + OPEN
)
EMPTY_THOUGHT = THINKING.replace("(message.reasoning_content or '')", "''")
SPACED = (
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + message.content + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
WRAPPED = (
    TURN + "{%- if message.role == 'user' %}{{- message.content + '<|im_end|>\n' }}{%- else %}"
    "{{- '[final] ' + message.content + ' [end]<|im_end|>\n' }}{%- endif %}{%- endfor %}" + OPEN
)
CHANNELS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role }}{%- if message.role == 'assistant' %}"
    "{%- if message.thinking %}{{- '<|channel|>analysis<|message|>' + message.thinking + '<|im_start|>assistant' }}"
    "{%- endif %}{{- '<|channel|>final' }}{%- endif %}"
    "{{- '<|message|>' + message.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)
OPENED = TURN + (
    "{%- if message.role == 'assistant' %}{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}"
    "{%- endif %}{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    + OPEN.replace("assistant\n", "assistant\n<think>\n")
)
UNSEEN = OPENED.replace("'<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n'", "''")
SPECIAL = ("<|channel|>", "<|message|>", "<|im_start|>", "<|im_end|>")
NAMED = {"chatml": templates.CHATML, "thinking": EMPTY_THOUGHT, "spaced": SPACED, "wrapped": WRAPPED,
         "channels": CHANNELS}  # fmt: skip


def _frame(template: str) -> AnswerFrame:
    return find_frame(ChatTemplate(template, "<s>", "</s>"), ASK, stops=STOPS)


def _pieces(text: str) -> list[TextPiece]:
    """Split a text at special tokens, and the rest into characters."""
    found, at = [], 0
    while at < len(text):
        special = next((each for each in SPECIAL if text.startswith(each, at)), None)
        found.append(TextPiece(special or text[at], special is not None))
        at += len(special or "x")
    return found


@pytest.mark.parametrize(
    ("template", "frame"),
    [
        (templates.CHATML, AnswerFrame()),
        (SPACED, AnswerFrame(" ", " ")),
        (WRAPPED, AnswerFrame("[final] ", " [end]")),
        (THINKING, AnswerFrame("<think>\n\n</think>\n\n", "", "<think>\n", "\n</think>\n\n")),
        (EMPTY_THOUGHT, AnswerFrame("<think>\n\n</think>\n\n", "", "<think>", "</think>\n\n")),
        (CHANNELS, AnswerFrame("<|channel|>final<|message|>", "", "<|channel|>analysis<|message|>",
                               "<|im_start|>assistant<|channel|>final<|message|>")),
        (OPENED, AnswerFrame("\n</think>\n\n", "", "", "\n</think>\n\n", is_opened=True)),
        (UNSEEN, AnswerFrame("\n</think>\n\n", "", "", "\n</think>\n\n", is_opened=True)),
        ("{{ raise_exception('no') }}", AnswerFrame()),
    ],
)  # fmt: skip
def test_the_frame_is_what_the_template_writes_around_a_content(template: str, frame: AnswerFrame) -> None:
    assert _frame(template) == frame


@pytest.mark.parametrize("name", ["chatml", "thinking", "spaced", "wrapped", "channels"])
@given(content=st.text("green {}[]</>\n", max_size=12))
def test_an_answer_is_read_back_from_its_rendering(name: str, content: str) -> None:
    template = ChatTemplate(NAMED[name], "<s>", "</s>")
    prompt = template.render(ASK, add_generation_prompt=True)
    turn = template.render([*ASK, {"role": "assistant", "content": content}])[len(prompt) :]
    turn = turn[: min(turn.find(stop) for stop in STOPS if stop in turn)]
    frame = _frame(NAMED[name])
    assert read_answer(frame, _pieces(turn)) == content
    assert read_answer(frame, [TextPiece(turn)]) == content


@pytest.mark.parametrize(
    ("template", "text", "answer", "thought"),
    [
        (THINKING, "<think>\nhm <b>\n</think>\n\ngreen", "green", "\nhm <b>\n"),
        (THINKING, "\n<think></think>green", "green", ""),
        (THINKING, "green", "green", ""),
        (THINKING, "<think>\nhm", "", "\nhm"),
        (THINKING, "<thi", "<thi", ""),
        (WRAPPED, "green [end", "green [end", ""),
        (WRAPPED, "[final] green [end] [end]", "green [end]", ""),
        (OPENED, "hm\n</think>\n\ngreen", "green", "hm\n"),
        (CHANNELS, "<|channel|>analysis<|message|>hm<|im_start|>assistant<|channel|>final<|message|>{}", "{}", "hm"),
        (CHANNELS, "<|channel|>analysis<|message|>hm<|im_start|>assistant<|channel|>commentary<|message|>{}",
         "assistantcommentary{}", "hm"),
        (templates.CHATML, "<think>\nhm\n</think>\n\ngreen", "<think>\nhm\n</think>\n\ngreen", ""),
    ],
)  # fmt: skip
def test_reasoning_is_told_from_the_answer(template: str, text: str, answer: str, thought: str) -> None:
    reader = AnswerReader(_frame(template))
    parts: list[Part] = [part for piece in _pieces(text) for part in reader.feed(piece)]
    parts += reader.finish(is_cut=True)
    assert "".join(part.text for part in parts if not part.is_thought) == answer
    assert "".join(part.text for part in parts if part.is_thought) == thought


def test_a_text_that_never_leaves_reasoning_is_the_answer_if_it_ends_by_itself() -> None:
    assert read_answer(_frame(OPENED), [TextPiece("It is green.")]) == "It is green."
    assert read_answer(_frame(OPENED), [TextPiece("It is")], is_cut=True) == ""


def test_the_answer_is_streamed_as_soon_as_it_is_certain() -> None:
    reader = AnswerReader(_frame(THINKING))
    told = [
        [part.text for part in reader.feed(TextPiece(text))]
        for text in ("<think>", "\n\n</think>", "\n\n", "gr", "een")
    ]
    assert told == [[], [], [], ["gr"], ["een"]]


def _encode(text: str) -> list[int]:
    """Characters as tokens, but ` r` is one."""
    return [ord(each) for each in text.replace(" r", "R")]


def _decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids)).replace("R", " r")


def test_choices_are_scored_behind_the_prefix_from_the_same_token_on() -> None:
    """` r` is one token, so ` ` is scored for the other choice, too."""
    red, blue = continuations(_encode, _decode, "ab", ["red", "blue"], prefix=" ")
    assert (red[0].tolist(), red[1].tolist()) == ([97, 98, 82, 101, 100], [2, 3, 4])
    assert blue[1].tolist() == [2, 3, 4, 5, 6]
    header = continuations(_encode, _decode, "ab", ["red", "blue"], prefix="h:")
    assert [positions.tolist() for _, positions in header] == [[4, 5, 6], [4, 5, 6, 7]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnable.make_base(tmp_path_factory.mktemp("learnable"))


def _task_shares(run: RunDirectory, file: Path) -> tuple[float, float]:
    """Return the share of right answers of the trained model and of the file."""
    stored = Reference.open(run.reference).task
    assert stored is not None
    with load(file) as runtime:
        score = task.run_task(runtime, stored, 64, lambda done, total: None)
        assert score is not None
        assert score.same_as_trained == score.rows
        agreement, fault = greedy.compare_answers(
            runtime, Reference.open(run.reference).greedy, runtime.stop_tokens, lambda done, total: None
        )
    assert fault is None
    assert agreement is not None
    assert agreement.mean == 1
    return task.stored_score(stored, "trained").right / score.rows, score.right / score.rows


def _recapture(run: RunDirectory, answer: str) -> None:
    from edgetune.training import environment
    from edgetune.training.capture.recapture import RecaptureRequest, recapture

    config = load_config(run.path.parent / "config.yaml", [f"data.answer={answer}"])
    with environment.silence_libraries():
        recapture(run, config, RecaptureRequest(reference=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_a_model_that_knows_its_rows_by_heart_scores_100_percent(base: Path, tmp_path: Path, name: str) -> None:
    run = learnable.train_by_heart(base, tmp_path, NAMED[name])
    assert run.train_results.eval_loss < 1e-3
    assert edgetune("merge-export", run.path, "-q", "q8_0").returncode == 0
    file = run.artifacts / "run-q8_0.gguf"
    assert _task_shares(run, file) == (1, 1)
    for answer in ("choice", "regex"):
        _recapture(run, answer)
        assert _task_shares(run, file) == (1, 1)
    assert edgetune("run", file, "-p", "lamp 73 green?").stdout == b"green\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_json_and_numbers_are_compared_without_the_text_around_them(base: Path, tmp_path: Path, name: str) -> None:
    run = learnable.train_by_heart(base, tmp_path, NAMED[name], "data.answer=json", answer='{"n": 7, "is": "{color}"}')
    assert edgetune("merge-export", run.path, "-q", "q8_0").returncode == 0
    file = run.artifacts / "run-q8_0.gguf"
    assert _task_shares(run, file) == (1, 1)
    _recapture(run, "number")
    assert _task_shares(run, file) == (1, 1)
    said = edgetune("run", file, "-p", "lamp 73 green?").stdout
    assert json.loads(said) == {"n": 7, "is": "green"}
