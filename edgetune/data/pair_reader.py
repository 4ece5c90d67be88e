"""Preference pairs of the common formats: one prompt with a better and a worse answer.

The prompt stands beside the answers, or both answers are whole conversations that begin with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any, ClassVar

from edgetune.data import key_names as names
from edgetune.data.chat_rows import ChatRow, Pair
from edgetune.data.formats import RowReader, read_beside, read_weights
from edgetune.data.key_names import KeyFinder, fold
from edgetune.data.messages import Turn, check_characters, is_empty, parse_json_text, read_content
from edgetune.data.problems import RowProblem
from edgetune.data.row_kinds import PAIR
from edgetune.data.row_layouts import RowLayout

_DIALOGUE = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_ITEM_TEXTS = ("response", "text", "content", "answer", "completion", "output", "value", "generation")
_RANKS = {fold(name) for name in names.RANKS}
_EQUAL_HINT = "Remove such pairs, or leave them out with data.on_bad_row: skip"


@dataclass(frozen=True)
class _Side:
    """A better or worse answer."""

    key: str
    turns: list[Turn]

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole conversation, with the prompt."""
        return bool(self.turns[0].message["role"] != "assistant")


class PairReader(RowReader):
    """Converts rows to preference pairs."""

    kind: ClassVar[str] = PAIR

    def describe(self) -> list[str]:
        lines = []
        if self.tally["ranked"]:
            lines.append(
                f"ranked answers of {_count_rows(self.tally['ranked'])} became {self.tally['pairs']} pairs: one for "
                "each two answers of different ranks"
            )
        if self.tally["several"]:
            lines.append(f"{_count_rows(self.tally['several'])} with several rejected answers: a pair for each of them")
        if self.tally["common"]:
            lines.append(
                f"{_count_rows(self.tally['common'])} without a prompt beside chosen and rejected: the beginning that "
                "both texts share is the prompt"
            )
        return lines

    def read(self, row: Any, place: str = "") -> ChatRow:
        """Return the first pair of a row. Raises RowProblem."""
        return next(self.read_all(row, place))

    def read_all(self, row: Any, place: str = "") -> Iterator[ChatRow]:
        row, layout = self._find_layout(_flatten_input(row))
        yield from (self._read_ranked if layout.form == "ranked" else self._read_preference)(row, layout, place)

    def _read_preference(self, row: Mapping[str, Any], layout: RowLayout, place: str) -> list[ChatRow]:
        keys = layout.keys
        rejected = self._answers(row[keys["rejected"]], keys["rejected"])
        given = self._context(row, keys)
        if "user" in keys and "chosen" in keys and _is_dialogue(row[keys["user"]]):  # a space follows "Assistant:"
            row = {**row, **{keys[side]: _strip(row[keys[side]]) for side in ("chosen", "rejected")}}
            rejected = self._answers(row[keys["rejected"]], keys["rejected"])
        if "chosen" in keys:
            chosen = self._answers(row[keys["chosen"]], keys["chosen"])
            if len(chosen) > 1:
                raise RowProblem(f"{keys['chosen']} is a list of {len(chosen)} texts; give one text")
            better = chosen[0]
        else:
            better, given = _Side(keys["messages"], given), []
            if not given and better.turns[-1].message["role"] != "assistant":
                raise RowProblem(f"{keys['messages']} end without an answer that {keys['rejected']} is worse than")
        if len(rejected) > 1:
            self.tally["several"] += 1
        return _name_keys_once(
            self._pair(row, layout, given, better, worse, f"{place}, answer {number}" if len(rejected) > 1 else place)
            for number, worse in enumerate(rejected, 1)
        )

    def _read_ranked(self, row: Mapping[str, Any], layout: RowLayout, place: str) -> list[ChatRow]:
        key = layout.keys["responses"]
        value = row[key]
        listed = parse_json_text(value, key) if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) < 2:
            raise RowProblem(f"{key} is not a list of several answers to the prompt")
        given = self._context(row, layout.keys)
        if not given:
            raise RowProblem("has no prompt")
        items = [self._item(each, f"{key}[{number}]") for number, each in enumerate(listed, 1)]
        scores = self._scores(row, layout, [score for _, score in items])
        pairs = [
            (one, other) if scores[one] > scores[other] else (other, one)
            for one, other in combinations(range(len(items)), 2)
            if scores[one] != scores[other]
        ]
        if not pairs:
            raise RowProblem(f"all answers of {key} have the same score, so none is better")
        found = _name_keys_once(
            self._pair(
                row, layout, given, items[better][0], items[worse][0], f"{place}, answers {better + 1} and {worse + 1}"
            )
            for better, worse in pairs
        )
        self.tally["ranked"] += 1
        self.tally["pairs"] += len(found)
        return found

    def _item(self, value: Any, key: str) -> tuple[_Side, float | None]:
        """Return one of several answers, and its score (higher is better) if it states one."""
        if not isinstance(value, Mapping) or self._messages.is_message(value):
            return self._answers(value, key)[0], None
        finder = KeyFinder(value)
        text, number = finder.first(_ITEM_TEXTS), finder.first(names.SCORE_KEYS)
        if text is None:
            raise RowProblem(f"{key} has no text; its keys are {', '.join(map(str, value)) or 'none'}")
        content = read_content(value[text], text)
        rest = [f"{key.partition('[')[0]}[].{name}" for name in value if name not in (text, number)]
        unread = (*content.unread, *(label for label in rest if not is_empty(value[label.rpartition(".")[2]])))
        turn = Turn({"role": "assistant", "content": content.text}, True, None, content.reasoning, unread)
        score = None if number is None or is_empty(value[number]) else _number(value[number], f"{key}.{number}")
        if score is not None and number is not None and fold(number) in _RANKS:
            score = -score
        return _Side(key, [turn]), score

    def _scores(self, row: Mapping[str, Any], layout: RowLayout, own: Sequence[float | None]) -> list[float]:
        """Return a number for each of several answers; the best has the highest."""
        key = layout.keys.get("scores")
        if key is not None:
            value = row[key]
            listed = parse_json_text(value, key) if isinstance(value, str) else value
            if not isinstance(listed, list) or len(listed) != len(own):
                size = len(listed) if isinstance(listed, list) else "no list of"
                raise RowProblem(f"{key} has {size} numbers for {len(own)} answers")
            sign = -1.0 if fold(key) in _RANKS else 1.0
            return [sign * _number(each, key) for each in listed]
        scores = [each for each in own if each is not None]
        if scores and len(scores) < len(own):
            raise RowProblem(f"{len(own) - len(scores)} of {len(own)} answers have no score")
        return scores or [float(-at) for at in range(len(own))]

    def _answers(self, value: Any, key: str) -> list[_Side]:
        """Return an answer: a text, messages, or a text that spells a dialogue; of a list of texts, each."""
        if isinstance(value, str):
            if turns := _split_dialogue(value):
                return [_Side(key, turns)]
            if value.lstrip()[:2] in ("[{", '{"', "{'"):  # messages in a cell of a table
                value = self._messages_in(value, key)
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            return [side for each in value for side in self._answers(each, key)]
        turns = self._side(value, key, "assistant")
        return [_Side(key, turns)]

    def _messages_in(self, text: str, key: str) -> Any:
        """Return the messages that a text spells as JSON; the text itself if it spells something else."""
        try:
            value = parse_json_text(text, key)
        except RowProblem:
            return text
        listed = value if isinstance(value, list) else [value]
        return value if listed and all(self._messages.is_message(each) for each in listed) else text

    def _context(self, row: Mapping[str, Any], keys: Mapping[str, str]) -> list[Turn]:
        """Return the messages that stand beside the answers; [] if there are none."""
        if "messages" in keys:
            return self._turns(row[keys["messages"]], keys["messages"])
        if "user" not in keys:
            return []
        value = row[keys["user"]]
        if isinstance(value, str):
            if turns := _split_dialogue(value):
                return turns
            if value.lstrip()[:2] in ("[{", '{"', "{'"):
                row = {**row, keys["user"]: self._messages_in(value, keys["user"])}
        return self._question(row, keys)

    def _pair(
        self, row: Mapping[str, Any], layout: RowLayout, given: list[Turn], better: _Side, worse: _Side, place: str
    ) -> ChatRow:
        labels: list[str] = []
        if better.is_whole or worse.is_whole:
            prompt, answers = _divide(better, worse)
            labels += _unused_context(given, prompt, better.turns, layout.keys)
        else:
            prompt, answers = self._with_context(given, better, worse)
        if _contents(answers[0]) == _contents(answers[1]):
            raise RowProblem(
                f"{better.key} and {worse.key} are equal answers, so the pair teaches nothing", _EQUAL_HINT
            )
        if "messages" in layout.keys and "user" in layout.keys and not better.is_whole:
            labels += _unused_context(self._question(row, layout.keys), prompt, better.turns, layout.keys)
        prompt, ignored = self._join(row, layout.keys, prompt)
        row_is_trained, flags = read_weights(row, layout.weights)
        tools, options, unread = read_beside(row, layout)
        labels += [*ignored, *(key for key in unread if key not in flags)]
        rows = []
        for answer in answers:
            turns = [*prompt, *answer]
            check_characters([turn.message for turn in turns])
            of_messages = dict.fromkeys(f"{key} of a message" for turn in turns for key in turn.unread)
            trained = {at for at, turn in enumerate(turns) if at >= len(prompt) and turn.trained and row_is_trained}
            rows.append(
                ChatRow(
                    [turn.message for turn in turns],
                    tools,
                    frozenset(
                        at for at, t in enumerate(turns) if t.message["role"] == "assistant" and at not in trained
                    ),
                    place,
                    options,
                    (*labels, *of_messages),
                    {at: turn.calls for at, turn in enumerate(turns) if turn.calls},
                    {at: turn.reasoning for at, turn in enumerate(turns) if turn.reasoning},
                )
            )
        chosen, rejected = rows
        margin = layout.keys.get("margin")
        chosen.beside = Pair(rejected, len(prompt), None if margin is None else _number(row[margin], margin))
        return chosen

    def _with_context(
        self, given: list[Turn], better: _Side, worse: _Side
    ) -> tuple[list[Turn], tuple[list[Turn], list[Turn]]]:
        """Return the prompt that stands beside two answers, and the answers."""
        if not given:
            return self._common_beginning(better, worse)
        end = len(given)
        while end and given[end - 1].message["role"] == "assistant":
            end -= 1
        if end < len(given) and _contents(given[end:]) != _contents(better.turns):
            raise RowProblem(
                f"the prompt ends with an answer of the assistant, and {better.key} is another one",
                "End the prompt with the user's message",
            )
        if not end:
            raise RowProblem("has no prompt: no message precedes the answers")
        return given[:end], (better.turns, worse.turns)

    def _common_beginning(self, better: _Side, worse: _Side) -> tuple[list[Turn], tuple[list[Turn], list[Turn]]]:
        """Divide two texts behind the last word that both begin with, as TRL does."""
        texts = [side.turns[0].message.get("content") for side in (better, worse)]
        one, other = (text if isinstance(text, str) else "" for text in texts)
        if one.strip() == other.strip():
            raise RowProblem(f"{better.key} and {worse.key} are equal, so the pair teaches nothing", _EQUAL_HINT)
        common = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        end = max((at for at, character in enumerate(common) if character.isspace()), default=-1) + 1
        if len(better.turns) + len(worse.turns) > 2 or not common[:end].strip():
            raise RowProblem(
                f"{better.key} and {worse.key} have no prompt: none stands beside them, and they share no beginning",
                "Give the prompt as `prompt` or `messages`; data.columns names keys of your own",
            )
        self.tally["common"] += 1
        answers = [[Turn({"role": "assistant", "content": text[end:].strip()})] for text in (one, other)]
        return [Turn({"role": "user", "content": common[:end].strip()})], (answers[0], answers[1])


def _name_keys_once(pairs: Iterable[ChatRow]) -> list[ChatRow]:
    """Return the pairs of one row, with the keys of the row that are not used in the first of them alone."""
    found = list(pairs)
    unread: dict[str, None] = {}
    for chosen in found:
        assert isinstance(chosen.beside, Pair)
        unread |= dict.fromkeys((*chosen.unread, *chosen.beside.rejected.unread))
        chosen.unread = chosen.beside.rejected.unread = ()
    found[0].unread = tuple(unread)
    return found


def _flatten_input(row: Any) -> Any:
    """Return a row whose `input` is an object with messages (OpenAI) with the keys of the object itself."""
    if isinstance(row, Mapping) and isinstance(row.get("input"), Mapping) and "messages" in row["input"]:
        return {**row["input"], **{key: value for key, value in row.items() if key != "input"}}
    return row


def _is_dialogue(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "Assistant:" in text


def _strip(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _split_dialogue(text: str) -> list[Turn]:
    r"""Return the messages of a text such as "\n\nHuman: Hi\n\nAssistant: Hello"; [] for another text.

    An empty answer at the end is where the model is to answer.
    """
    if not _is_dialogue(text):
        return []
    _, *parts = _DIALOGUE.split(text)
    turns = [
        Turn({"role": "user" if speaker == "Human" else "assistant", "content": said.strip()})
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1].message == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def _divide(better: _Side, worse: _Side) -> tuple[list[Turn], tuple[list[Turn], list[Turn]]]:
    """Return the prompt of whole conversations, and the two answers."""
    wholes = [side for side in (better, worse) if side.is_whole]
    shortest = min(_count_prompt(side) for side in wholes)
    prompt = wholes[0].turns[:shortest]
    if len(wholes) == 2:
        pairs = zip(better.turns, worse.turns, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0].message == pair[1].message, pairs))
        end = min(shared, max(map(_count_prompt, wholes)), len(better.turns) - 1, len(worse.turns) - 1)
        while end and better.turns[end - 1].message["role"] == "assistant":
            end -= 1
        prompt = better.turns[:end]
    answers = [side.turns[len(prompt) :] if side.is_whole else side.turns for side in (better, worse)]
    for side, answer in zip((better, worse), answers, strict=True):
        if not prompt or answer[0].message["role"] != "assistant":
            raise RowProblem(
                f"{better.key} and {worse.key} differ before an answer: message {len(prompt) + 1} of {side.key} has "
                f"the role {answer[0].message['role']}",
                "Give two answers to one prompt",
            )
    return prompt, (answers[0], answers[1])


def _count_prompt(side: _Side) -> int:
    """Count the messages before the last answer of a whole conversation."""
    end = len(side.turns)
    while end and side.turns[end - 1].message["role"] == "assistant":
        end -= 1
    if end == len(side.turns):
        raise RowProblem(f"{side.key} ends without an answer")
    return end


def _unused_context(
    given: Sequence[Turn], prompt: Sequence[Turn], whole: Sequence[Turn], keys: Mapping[str, str]
) -> list[str]:
    """Return the label of a prompt that says something else than the conversations beside it."""
    said = _contents(given)
    if not said or said == _contents(prompt)[-len(said) :] or said == _contents(whole):
        return []
    key = keys.get("messages") or keys["user"]
    return [f"{key} beside chosen and rejected answers that are whole conversations"]


def _contents(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return messages without white space around their texts, to compare them."""
    return [
        {key: value.strip() if isinstance(value, str) else value for key, value in turn.message.items()}
        | ({"reasoning": turn.reasoning} if turn.reasoning else {})
        for turn in turns
    ]


def _count_rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _number(value: Any, key: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number:
        raise RowProblem(f"{key} is {value!r}, not a number")
    return number
