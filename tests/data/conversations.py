"""Fifty kinds of conversations, as rows bring them: (messages, tools) by name."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
Case = tuple[list[Message], list[dict[str, Any]] | None]


def user(content: Any, **keys: Any) -> Message:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> Message:
    return {"role": "assistant", "content": content, **keys}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def tool(content: Any, **keys: Any) -> Message:
    return {"role": "tool", "content": content, **keys}


def call(name: str, arguments: Any, id_: str = "call00001") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


LIGHT = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Dim a light – «now»",
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"type": "string", "description": "The room", "enum": ["bedroom", "hall"]},
                "level": {"type": "integer", "default": 30},
                "at": {"type": ["string", "null"]},
                "colors": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["room"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tell the time", "parameters": {
    "type": "object", "properties": {}}}}  # fmt: skip
DIM = {"room": "bedroom", "level": 30}
Q, A = user("What is 2 + 3?"), assistant("5")
ASK = user("Dim the bedroom light.")

DIMMED = assistant("", tool_calls=[call("set_light", DIM)])
DONE = tool("done", name="set_light", tool_call_id="call00001")
BOTH = assistant("", tool_calls=[call("set_light", DIM), call("clock", {}, "call00002")])
NOON = tool("12:00", name="clock", tool_call_id="call00002")

CONVERSATIONS: dict[str, Case] = {
    "question": ([Q], None),
    "one turn": ([Q, A], None),
    "two turns": ([Q, A, user("And 4?"), assistant("9")], None),
    "five turns": ([message for i in range(5) for message in (user(f"q{i}"), assistant(f"a{i}"))], None),
    "trailing question": ([Q, A, user("And 4?")], None),
    "system": ([system("Be brief."), Q, A], None),
    "system and question": ([system("Be brief."), Q], None),
    "empty system": ([system(""), Q, A], None),
    "two systems": ([system("Be brief."), system("Be kind."), Q, A], None),
    "late system": ([Q, A, system("Be brief."), user("And 4?"), assistant("9")], None),
    "system alone": ([system("Be brief.")], None),
    "system and answer": ([system("Be brief."), A], None),
    "developer": ([{"role": "developer", "content": "Be brief."}, Q, A], None),
    "unknown role": ([{"role": "critic", "content": "Hm."}, Q, A], None),
    "answer first": ([A, Q, assistant("6")], None),
    "answer alone": ([A], None),
    "two questions": ([Q, user("Well?"), A], None),
    "two answers": ([Q, A, assistant("Five.")], None),
    "two answers, then a turn": ([Q, A, assistant("Five."), user("And 4?"), assistant("9")], None),
    "empty answer": ([Q, assistant("")], None),
    "empty question": ([user(""), A], None),
    "white space around": ([user("  q \n"), assistant("\n\n a \t\n"), user("\tq2"), assistant(" a2 ")], None),
    "white space alone": ([user(" "), assistant("\n")], None),
    "line ends": ([user("a\r\nb\n\n\nc"), assistant("d\r\ne")], None),
    "scripts": ([user("把灯关掉 مرحبا नमस्ते"), assistant("好的 👍🏽 👨‍👩‍👧‍👦")], None),
    "odd code points": ([user("a\u200bb\u00a0c\ufeffd\u2028e"), assistant("\U0001f1e8\U0001f1ed e\u0301 x")], None),
    "markup": ([user("<b>&amp; 'x' \"y\" \\n {{ z }} {% raw %}"), assistant("<|im_end|> </s> [INST] <eos>")], None),
    "json answer": ([Q, assistant('{"a": [1, 2.5, null, true]}')], None),
    "code": ([user("code"), assistant("```python\ndef f(x):\n    return {'a': x}\n```")], None),
    "long": ([user("word " * 800), assistant("answer " * 300)], None),
    "reasoning_content": ([Q, assistant("5", reasoning_content="Two and three.")], None),
    "thinking": ([Q, assistant("5", thinking="Two and three.")], None),
    "reasoning": ([Q, assistant("5", reasoning="Two and three.")], None),
    "reasoning in two turns": (
        [Q, assistant("5", reasoning_content="One."), user("And 4?"), assistant("9", reasoning_content="Two.")], None),
    "thought in the content": ([Q, assistant("<think>\nTwo and three.\n</think>\n\n5"), user("And 4?")], None),
    "thought in the last content": ([Q, assistant("<think>\nTwo and three.\n</think>\n\n5")], None),
    "parts": ([user([{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]), A], None),
    "parts of an answer": ([Q, assistant([{"type": "text", "text": "5"}])], None),
    "null content": ([Q, assistant(None)], None),
    "no content": ([Q, {"role": "assistant"}], None),
    "names": ([user("Hi", name="ann"), assistant("Hello", name="bob")], None),
    "tools": ([ASK, assistant("Which one?")], [LIGHT, CLOCK]),
    "tools and system": ([system("Act."), ASK, assistant("Which one?")], [LIGHT]),
    "tools and question": ([ASK], [LIGHT]),
    "no tools": ([ASK, A], []),
    "plain tool": ([ASK, A], [LIGHT["function"]]),  # type: ignore[list-item]
    "call": ([ASK, DIMMED], [LIGHT]),
    "call with null": ([ASK, assistant(None, tool_calls=[call("set_light", DIM)])], [LIGHT]),
    "call without content": ([ASK, {"role": "assistant", "tool_calls": [call("set_light", DIM)]}], [LIGHT]),
    "call as text": ([ASK, assistant("", tool_calls=[call("set_light", '{"room": "bedroom"}')])], [LIGHT]),
    "call and words": ([ASK, assistant("I dim it.", tool_calls=[call("set_light", DIM)])], [LIGHT]),
    "call and reasoning": (
        [ASK, assistant("", reasoning_content="Dim.", tool_calls=[call("set_light", DIM)])], [LIGHT]),
    "two calls": (
        [ASK, BOTH], [LIGHT, CLOCK]),
    "nested arguments": (
        [ASK, assistant("", tool_calls=[call("set_light", {"a": {"b": ["é", None, 1.5, True]}})])], [LIGHT]),
    "result": (
        [ASK, DIMMED, DONE,
         assistant("It is dim.")], [LIGHT]),
    "result without an id": (
        [ASK, DIMMED, tool("done"), assistant("It is dim.")], [LIGHT]),
    "result as a mapping": (
        [ASK, DIMMED, tool({"ok": True}, name="set_light"),
         assistant("It is dim.")], [LIGHT]),
    "two results": (
        [ASK, BOTH,
         DONE, NOON,
         assistant("It is dim at noon.")], [LIGHT, CLOCK]),
    "trailing result": (
        [ASK, DIMMED, tool("done", name="set_light")], [LIGHT]),
    "calls without tools": (
        [ASK, DIMMED, DONE, assistant("Dim.")], None),
    "call after an answer": (
        [Q, A, ASK, DIMMED, DONE, assistant("Dim."),
         user("Thanks"), assistant("Welcome.")], [LIGHT]),
    "nothing": ([], None),
}  # fmt: skip
