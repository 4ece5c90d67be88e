"""Golden conversations: texts and token ids that the template and tokenizer of an exported file must reproduce."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.formats import ChatRow, Conversation
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError

OWN_ROWS = 8
"""Number of the user's rows that are added to the golden conversations."""


def _ask(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def _talk(*texts: str, system: str | None = None) -> Conversation:
    """Alternate user and assistant messages."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


GOLDEN: tuple[Conversation, ...] = (
    _ask("Hello"),
    _ask("Dim the bedroom lights to 30% at 7:05 pm, please."),
    _ask("把卧室的灯调到三成亮。"),
    _ask("naïve café — “quotes”, ½ × 3² ≠ ∞, Ångström, Straße"),
    _ask("emoji 👍🏽 family 👨‍👩‍👧‍👦 flag 🇨🇭 zero\u200bwidth nbsp\u00a0end"),
    _ask("مرحبا بالعالم, שלום, Привет, こんにちは, 안녕하세요, नमस्ते"),
    _ask("e\u0301 and é differ in code points; ﬁ is a ligature; Ⅷ is a numeral"),
    _ask("  leading and trailing spaces  "),
    _ask("lines\nand\n\nblank lines\r\nand\ttabs\n"),
    _ask("def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # comment\n\n\nprint(f(3))"),
    _ask('{"action": "set", "device": "light", "value": 0.3, "list": [1, 2, 3]}'),
    _ask("numbers 1 12 123 1234 12345 3.14159 1,000,000 0x1F -7 1e-9"),
    _ask("text that looks special: <s> </s> <|im_end|> <|endoftext|> [INST] <unk> {{ x }} {% raw %}"),
    _ask("I'm, you're, it's, WE'LL, don't; CamelCase snake_case kebab-case"),
    _ask("a" * 70 + " " * 17 + "!?" * 9),
    _talk("Hi", "Hello! How can I help?", "What is 2 + 2?"),
    _talk("Hi", "Hello!", "And now?", "Now we stop.", "Fine", system="You are a terse assistant."),
    _talk("Is an empty system message kept?", system=""),
    _talk("A question", "An answer"),
    _talk("One", "Two", "Three", "Four"),
    _talk("An empty answer", "", "and an empty question", "Yes?", ""),
    _talk("   ", system="  spaces around the system message  "),
    [*_talk("What is the weather in Zürich?", '{"city": "Zürich"}'), {"role": "tool", "content": '{"celsius": 21.5}'}],
)
TOOL = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Dim a light – or switch it on «now»",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}, "level": {"type": "integer"}},
            "required": ["room"],
        },
    },
}
"""A tool that some conversations offer; a template without tool support ignores it."""
CALLED: Conversation = [
    {"role": "user", "content": "Dim the bedroom light."},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "set_light", "arguments": {"room": "bedroom", "level": 30}}}]},
    {"role": "tool", "content": "done", "name": "set_light"},
]  # fmt: skip
WITH_TOOLS: tuple[Conversation, ...] = (_ask("Dim the bedroom light."), _talk("Hi", system="You act."), CALLED)


def build_contract(template: ChatTemplate, tokenizer: TextTokenizer, own: Sequence[ChatRow]) -> list[dict[str, Any]]:
    """Render and tokenize the golden conversations and the user's own; leave out those that the template rejects.

    Args:
        template: The chat template of the run.
        tokenizer: The tokenizer that gives the token ids.
        own: Held-out rows of the user; the first OWN_ROWS are taken.
    """
    golden = [*_entries(template, tokenizer, GOLDEN), *_entries(template, tokenizer, WITH_TOOLS, [TOOL])]
    users = (
        entry
        for row in own[:OWN_ROWS]
        for entry in _entries(template, tokenizer, [row.messages], row.tools, row.options)
    )
    return [*({**entry, "own": False} for entry in golden), *({**entry, "own": True} for entry in users)]


def _entries(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    conversations: Iterable[Conversation],
    tools: list[dict[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterable[dict[str, Any]]:
    template = template.with_options(options or {})
    given = {name: value for name, value in (("tools", tools), ("options", options)) if value}
    for messages in conversations:
        prompt = messages[-1]["role"] != "assistant"
        rendering = template.at(template.clock.moment)  # with a clock of its own, which tells whether it was read
        try:
            text = rendering.render(messages, add_generation_prompt=prompt, tools=tools)
        except DataError:  # no system role, strict alternation, and so on
            continue
        ids, _ = tokenizer.encode(text)
        if tokenizer.without_row(ids):  # such as the placeholder for images of a text-only model
            continue
        kept = given | rendering.describe_rendering(tools)
        yield {"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids, **kept}
