"""No key of a row is dropped without a word: it is rendered, used, or named and counted, in every format and place."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.row_layouts import FORMATS
from tests.cases.rendering import TOOLS_TEMPLATE, encode, pictures, tokenizer_in, write_jsonl
from tests.cli_runner import edgetune
from tests.data import templates
from tests.training import runs

KEY, VALUE = "unheard_of", "its value"
PICKY_TEMPLATE = TOOLS_TEMPLATE.replace("tool | tojson", "tool.function.name + ': ' + tool.function.description")
"""Renders two keys of a tool and two of a call, and no others."""
NOTHING = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}{%- for c in m.tool_calls or [] %}{{- c.function.name }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"  # noqa: E501

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "dim",
        "description": "Dim a lamp.",
        "parameters": {"type": "object", "properties": {"level": {"type": "integer"}}},
    },
}
CALL: dict[str, Any] = {"type": "function", "id": "c1", "function": {"name": "dim", "arguments": {"level": 3}}}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PART = {"type": "text", "text": "q"}

ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": [PART]}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "done"}, ANSWER,
        ],
    },
    "sharegpt": {
        "tools": json.dumps([TOOL]),
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": [PART]}],
    },
    "alpaca": {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
    "prompt-completion": {"prompt": "q", "completion": [PART]},
}  # fmt: skip
PLACES: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    "messages": [
        ("row", ()), ("message", ("messages", 0)), ("answer", ("messages", 3)), ("call message", ("messages", 1)),
        ("content part", ("messages", 0, "content", 0)), ("tool", ("tools", 0)), ("function", ("tools", 0, "function")),
        ("schema", ("tools", 0, "function", "parameters")),
        ("parameter", ("tools", 0, "function", "parameters", "properties", "level")),
        ("call", ("messages", 1, "tool_calls", 0)), ("called", ("messages", 1, "tool_calls", 0, "function")),
    ],
    "sharegpt": [
        ("row", ()), ("message", ("conversations", 0)), ("answer", ("conversations", 1)),
        ("content part", ("conversations", 1, "value", 0)),
    ],
    "alpaca": [("row", ())],
    "prompt-completion": [("row", ()), ("content part", ("completion", 0))],
}  # fmt: skip
OF_OBJECTIVES: dict[str, tuple[str, dict[str, Any], list[tuple[Any, ...]]]] = {
    "preference": (
        "dpo",
        {"tools": [TOOL], "messages": [USER], "chosen": {"role": "assistant", "content": [PART]}, "rejected": "b"},
        [(), ("messages", 0), ("chosen",), ("chosen", "content", 0), ("tools", 0, "function")],
    ),
    "preference of conversations": (
        "orpo",
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        [(), ("chosen", 1), ("rejected", 1)],
    ),
    "preference without chosen": (
        "reward",
        {"messages": [USER, ANSWER], "rejected_response": "b"},
        [(), ("messages", 0), ("messages", 1)],
    ),
    "ranked": (
        "ipo",
        {"prompt": "q", "responses": [{"text": "a", "score": 2}, {"text": "b", "score": 1}]},
        [(), ("responses", 0), ("responses", 1)],
    ),
    "labelled": ("kto", {"messages": [USER, ANSWER], "label": True}, [(), ("messages", 0), ("messages", 1)]),
    "prompt": (
        "grpo",
        {"prompt": [{"role": "user", "content": [PART]}], "answer": "a"},
        [("prompt", 0), ("prompt", 0, "content", 0)],
    ),
    "distillation": ("distillation", {"messages": [USER]}, [("messages", 0)]),
    "text": ("pretrain", {"text": "q"}, [()]),
}
"""Rows of the objectives: the objective, a row, and the places of keys."""
CASES = [(form, name, path) for form, places in PLACES.items() for name, path in places]


def _with_key(row: dict[str, Any], path: tuple[Any, ...], key: str = KEY, value: Any = VALUE) -> dict[str, Any]:
    changed = copy.deepcopy(row)
    place: Any = changed
    for step in path:
        place = place[step]
    place[key] = value
    return changed


def _named_whole(path: tuple[Any, ...], template: str) -> str | None:
    """Return the label of the part around a key that is named as a whole."""
    if "tools" in path and template is NOTHING:
        return "tools, which"
    return "tools[].function.parameters, which" if "parameters" in path and template is PICKY_TEMPLATE else None


def test_all_formats_are_walked() -> None:
    assert ROWS.keys() == PLACES.keys()
    assert FORMATS.keys() - ROWS.keys() - OF_OBJECTIVES.keys() == set()


OBJECTIVE_CASES = [(form, path) for form, (_, _, places) in OF_OBJECTIVES.items() for path in places]


@pytest.mark.parametrize("template", [TOOLS_TEMPLATE, NOTHING], ids=["tojson", "nothing"])
@pytest.mark.parametrize(("form", "path"), OBJECTIVE_CASES, ids=str)
def test_an_unknown_key_of_an_objective_is_rendered_or_named_with_the_row(
    tmp_path: Path, template: str, form: str, path: tuple[Any, ...]
) -> None:
    objective, plain, _ = OF_OBJECTIVES[form]
    changed = _with_key(plain, path)
    encoding = encode(tmp_path, [plain, changed, plain, changed], template, objective)
    tokenizer = tokenizer_in(tmp_path / "base")
    rows = [*encoding.rows, *encoding.pairs.rejected.rows, *encoding.labelled.answers.rows]
    text = "".join(tokenizer.decode(row.input_ids) for row in rows)
    named = [line for line in encoding.usage.describe() if KEY in line]
    if VALUE in text:
        assert not named
    elif "tools" in path and template is NOTHING:
        assert any(line.startswith("tools, which") for line in encoding.usage.describe())
    else:
        (line,) = named
        assert re.search(r": 2 rows, for example rows.jsonl, line 2(, answers 1 and 2)?$", line)


def test_all_keys_beside_a_prompt_reach_the_reward_functions(tmp_path: Path) -> None:
    row = {"prompt": "q", "answer": "72", KEY: {"a": [VALUE]}, "level": None, "weight": 0, "label": True}
    encoding = encode(tmp_path, [row], objective="grpo")
    assert encoding.prompts[0].columns == {key: value for key, value in row.items() if key != "prompt"}
    assert not encoding.usage.unused


@pytest.mark.parametrize("template", [TOOLS_TEMPLATE, PICKY_TEMPLATE, NOTHING], ids=["tojson", "picky", "nothing"])
@pytest.mark.parametrize(("form", "name", "path"), CASES, ids=[f"{form} {name}" for form, name, _ in CASES])
def test_an_unknown_key_is_rendered_or_named_with_the_row(
    tmp_path: Path, template: str, form: str, name: str, path: tuple[Any, ...]
) -> None:
    plain = ROWS[form]
    rows = [plain, _with_key(plain, path), plain, _with_key(plain, path)]
    shown = pictures(tmp_path, rows, template)
    named = [line for line in encode(tmp_path, rows, template).usage.describe() if KEY in line]
    if VALUE in shown[1]:
        assert not named
        assert VALUE not in shown[0]
    elif whole := _named_whole(path, template):
        assert any(line.startswith(whole) for line in encode(tmp_path, rows, template).usage.describe())
    else:
        (line,) = named
        assert re.search(r": 2 rows, for example rows.jsonl, line 2$", line)
    assert shown[1].replace(f', "{KEY}": "{VALUE}"', "") == shown[0]


def test_the_keys_of_schemas_that_a_template_leaves_out_are_named_once(tmp_path: Path) -> None:
    row = _with_key(ROWS["messages"], ("tools", 0, "function", "parameters", "properties", "level"), "enum", [1, 2])
    labels = encode(tmp_path, [row, ROWS["messages"]], PICKY_TEMPLATE).usage.unused
    assert labels == {"tools[].function.parameters, which the chat template does not render": (2, "rows.jsonl, line 1")}
    picky = PICKY_TEMPLATE.replace(
        "tool.function.description", "(tool.function.parameters.properties.items() | map('first') | join)"
    )
    labels = encode(tmp_path, [row, ROWS["messages"]], picky).usage.unused
    assert {label.partition(",")[0]: count for label, (count, _) in labels.items()} == {
        "tools[].function.description": 2,
        "tools[].function.parameters.type": 2,
        "tools[].function.parameters.properties.*.type": 2,
        "tools[].function.parameters.properties.*.enum": 1,
    }


@pytest.mark.parametrize("key", ["weight", "train", "loss", "trainable", "loss_weight"])
@pytest.mark.parametrize(("form", "name", "path"), [case for case in CASES if case[1] in ("row", "answer")])
def test_flags_are_honored_at_every_place(
    tmp_path: Path, key: str, form: str, name: str, path: tuple[Any, ...]
) -> None:
    value: Any = 0 if "weight" in key else False
    rows = [ROWS[form], _with_key(ROWS[form], path, key, value)]
    encoding = encode(tmp_path, rows, TOOLS_TEMPLATE)
    assert encoding.untrained_turns > 0
    assert not any(key in label for label in encoding.usage.unused)


def test_columns_of_csv_are_counted(tmp_path: Path) -> None:
    from edgetune.data.chat import ChatTemplate
    from edgetune.data.dataset import encode_all
    from edgetune.data.sources import read_source

    (tmp_path / "rows.csv").write_text(f"question,answer,{KEY}\nq,a,x\nq,a,\nq,a,y\n")
    rows = read_source(str(tmp_path / "rows.csv")).rows
    encoding = encode_all(ChatTemplate(templates.CHATML), tokenizer_in(tmp_path / "base"), rows, 4096)
    assert encoding.usage.describe() == [f"{KEY}: 2 rows, for example rows.csv, line 2"]


@pytest.mark.parametrize("command", [["preview"], ["train", "--dry-run"]])
def test_unused_keys_are_printed_before_training(tmp_path: Path, command: list[str]) -> None:
    pytest.importorskip("torch")
    base = runs.make_base(tmp_path / "base")
    rows = [_with_key({"messages": [USER, ANSWER]}, path) for path in ((), ("messages", 0), ())]
    write_jsonl(tmp_path / "train.jsonl", rows)
    (tmp_path / "config.yaml").write_text(f"base: {base}\ndata: {{train: train.jsonl, validation: train.jsonl#1}}\n")
    output = [] if command == ["preview"] else ["-o", str(tmp_path / "run")]
    done = edgetune(command[0], tmp_path / "config.yaml", *command[1:], *output)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    assert "keys that are not used:" in said
    assert f"{KEY}: 3 rows, for example train.jsonl, line 1" in said
    assert (
        f"{KEY} of a message, which the chat template does not render: 1 row, for example train.jsonl, line 2" in said
    )
