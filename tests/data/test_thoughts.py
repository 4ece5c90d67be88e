"""An answer follows the prompt that the model is asked with, also where the template leaves the thought out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.data.answer_frame import TextPiece, find_frame, read_answer
from edgetune.data.masks import encode_conversation
from edgetune.data.thoughts import closes_thought, continue_prompt, opens_thought
from edgetune.data.turns import HistoryRewriteError, find_turns
from tests.converters import vocabularies
from tests.data.conversations import CONVERSATIONS, Q, assistant, system
from tests.data.template_tokenizers import tokenizer_for
from tests.data.test_real_templates import TEMPLATES, ours


@pytest.mark.parametrize(
    ("name", "kind", "prompt", "text"),
    [
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "one turn", "<think>\n", "\n</think>\n\n5<｜end▁of▁sentence｜>"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "reasoning_content", "<think>\n",
         "Two and three.\n</think>\n\n5<｜end▁of▁sentence｜>"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "thought in the last content", "<think>\n",
         "Two and three.\n</think>\n\n5<｜end▁of▁sentence｜>"),
        ("Qwen-QwQ-32B", "one turn", "<think>\n</think>", "5<|im_end|>\n"),
        ("GLM-4.7-Flash", "one turn", "<|assistant|><think>", "</think>5"),
        ("GLM-4.7-Flash", "thinking", "<|assistant|><think>", "Two and three.</think>5"),
        ("MiniMax-M2", "one turn", "<think>\n", "\n</think>\n\n5[e~[\n"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "one turn", "<think>\n", "</think>5<|im_end|>\n"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "reasoning", "<think>\n", "Two and three.\n</think>\n5<|im_end|>\n"),
        ("Cohere2MoE", "one turn", "<|START_THINKING|>",
         "<|END_THINKING|><|START_TEXT|>5<|END_TEXT|><|END_OF_TURN_TOKEN|>"),
        ("google-gemma-4-31B-it", "one turn", "<|channel>thought\n<channel|>", "5<turn|>\n"),
        ("Qwen3.5-4B", "one turn", "<think>\n", "\n</think>\n\n5<|im_end|>\n"),
    ],
)  # fmt: skip
def test_an_answer_follows_the_prompt_of_a_real_template(name: str, kind: str, prompt: str, text: str) -> None:
    messages, tools = CONVERSATIONS[kind]
    template = ours(name)
    (turn,) = find_turns(template, messages, tools)
    assert turn.prompt == template.render(messages[:-1], tools=tools, add_generation_prompt=True)
    assert turn.prompt.endswith(prompt)
    assert turn.text == text
    frame = find_frame(template, messages[:-1], tools, ["<|im_end|>", "<｜end▁of▁sentence｜>", "[e~[", "<turn|>"])
    said = turn.text.partition("<|im_end|>")[0].partition("<｜end")[0].partition("[e~[")[0].partition("<turn|>")[0]
    assert read_answer(frame, [TextPiece(said)]).removesuffix("<|END_TEXT|><|END_OF_TURN_TOKEN|>") == "5"


@pytest.mark.parametrize("name", ["Qwen-QwQ-32B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"])
def test_reasoning_behind_a_prompt_that_has_ended_it_is_refused_with_the_option(name: str) -> None:
    messages, tools = CONVERSATIONS["thought in the last content"]
    with pytest.raises(HistoryRewriteError, match="has already ended it") as caught:
        find_turns(ours(name), messages, tools)
    assert "the template reads enable_thinking" in (caught.value.hint or "")
    (turn,) = find_turns(ours(name).with_options({"enable_thinking": True}), messages, tools)
    assert turn.text.startswith("Two and three.\n</think>")


def test_a_system_message_before_the_last_question_stays_in_the_prompt() -> None:
    template = ours("mistralai-Mistral-Nemo-Instruct-2407")
    (turn,) = find_turns(template, [system("Be brief."), Q, assistant("5")])
    assert "Be brief.\n\nWhat is 2 + 3?[/INST]" in turn.prompt
    assert turn.text == "5</s>"


@pytest.mark.parametrize(
    ("prompt", "answered", "message", "text"),
    [
        ("q<think>", "qa", {}, "</think>a"),
        ("q<think>\n", "qa", {"reasoning": "r"}, "r\n</think>\n\na"),
        ("q<think>\n", "q<think>r</think>a", {}, "r</think>a"),
        ("q<think></think>", "q</think>a", {}, "a"),
        ("q[THINK]", "qa", {}, "[/THINK]a"),
        ("q\nAnswer:", "qa", {}, None),
        ("q<b>", "qa", {}, None),
        ("qx<think>", "qya", {}, None),
    ],
)
def test_only_a_thought_is_completed(prompt: str, answered: str, message: dict[str, Any], text: str | None) -> None:
    assert continue_prompt(prompt, answered, message) == text


def test_what_opens_and_ends_a_thought() -> None:
    assert opens_thought("q<think>\n")
    assert opens_thought("<|START_THINKING|>")
    assert not opens_thought("q</think>")
    assert not opens_thought("<|END_THINKING|>")
    assert not opens_thought("<|assistant|>")
    assert closes_thought("q</think>", "q<think>r</think>a")
    assert not closes_thought("q<think>", "qa")


def test_tags_behind_a_declared_stop_token_are_not_trained_on(tmp_path: Path) -> None:
    """This template opens the next turn whether one is asked for or not."""
    name = "CohereForAI-c4ai-command-r7b-12-2024-tool_use"
    vocabularies.byte_level(tmp_path)
    tokenizer = tokenizer_for(name, TEMPLATES[name], tmp_path)
    (row,) = encode_conversation(ours(name), tokenizer, CONVERSATIONS["one turn"][0]).rows
    trained = tokenizer.decode([row.input_ids[i] for i in row.scored])
    assert trained == "<|START_RESPONSE|>5<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert tokenizer.decode(row.input_ids).endswith("<|END_THINKING|>")


def test_the_header_of_a_next_turn_that_nobody_asks_for_is_not_trained_on(tmp_path: Path) -> None:
    name = "fireworks-ai-llama-3-firefunction-v2"
    vocabularies.byte_level(tmp_path)
    tokenizer = tokenizer_for(name, TEMPLATES[name], tmp_path)
    (row,) = encode_conversation(ours(name), tokenizer, CONVERSATIONS["one turn"][0]).rows
    assert tokenizer.decode([row.input_ids[i] for i in row.scored]) == "5<|eot_id|>"


def test_an_answer_that_leads_the_conversation_has_a_thought_of_its_own() -> None:
    first, second = find_turns(ours("GLM-4.7-Flash"), CONVERSATIONS["answer first"][0])
    assert (first.prompt, first.text) == ("[gMASK]<sop><|assistant|><think>", "</think>5")
    assert second.text == "</think>6"
