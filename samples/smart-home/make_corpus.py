"""Write the text that the base model is pretrained on: homes and wishes in two languages, and never a JSON action.

    python make_corpus.py --documents 20            look at some documents
    python make_corpus.py --documents 20000 --out corpus.jsonl

Every document is a list of turns. What they teach: which device, room, level and time a sentence speaks of (by
questions and answers, notes, confirmations), that two sentences mean the same (paraphrase, translation), how numbers
and times are written in digits, and how *unrelated* records look in JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

from lexicon import (
    COLORS,
    DEVICES,
    GENRES,
    KEYS,
    LANGUAGES,
    NAMES,
    ROOMS,
    SPAN_VALUES,
    SPEEDS,
    VALUES,
    Action,
    Value,
    name,
    random_action,
    read_wordings,
    sentence,
)


class Turn(TypedDict):
    """One turn of a document; role "text" is running text outside any conversation."""

    role: str
    content: str


Document = list[Turn]
WORDINGS = read_wordings("corpus")


def chat(*contents: str) -> Document:
    """A conversation: user and assistant in turn."""
    return [Turn(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(contents)]


# ------------------------------------------------------------------------------- values, in their plainest words

_ZH_ACTIONS = {
    "on": "打开",
    "off": "关掉",
    "set": "设定",
    "open": "开启",
    "close": "关上",
    "lock": "上锁",
    "unlock": "解锁",
    "play": "播放",
    "stop": "停止",
    "start": "启动",
    "query": "查询",
    "timer": "计时",
    "alarm": "闹钟",
}
_TRANSLATED = ("device", "room", "color", "speed", "genre")
_UNSAID = {"en": "none", "zh": "没说"}


def plain(language: str, key: str, value: Value | None) -> str:
    """A value as the model is to understand it: a dictionary form, digits, 24 hours."""
    if value is None:
        return _UNSAID[language]
    if language == "zh" and key == "action":
        return _ZH_ACTIONS[str(value)]
    return NAMES[key](value)[language][0] if language == "zh" and key in _TRANSLATED else str(value)


# -------------------------------------------------------------------------------------- questions and answers

QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "action": {"en": ("What is to be done?", "Which action?", "What is wanted?"), "zh": ("要做什么？", "什么动作？")},
    "device": {
        "en": ("Which device?", "What device is meant?", "Which thing is it about?"),
        "zh": ("哪个设备？", "什么设备？"),
    },
    "room": {"en": ("Which room?", "Where?", "In what room?"), "zh": ("哪个房间？", "在哪里？")},
    "level": {"en": ("What level?", "How many percent?", "To which level?"), "zh": ("多少？", "百分之几？")},
    "color": {"en": ("Which color?", "What color is wanted?"), "zh": ("什么颜色？",)},
    "temperature": {"en": ("What temperature?", "How many degrees?"), "zh": ("多少度？", "什么温度？")},
    "speed": {"en": ("Which speed?", "How fast?"), "zh": ("什么速度？",)},
    "volume": {"en": ("What volume?", "How loud?"), "zh": ("音量多少？",)},
    "genre": {"en": ("What genre?", "Which kind of music?"), "zh": ("什么音乐？",)},
    "time": {"en": ("At what time?", "What time on the 24 hour clock?", "When?"), "zh": ("几点？", "什么时间？")},
    "in": {"en": ("In how long?", "After how long?"), "zh": ("多久以后？", "过多久？")},
}
FIELDS = {
    "en": {key: key for key in KEYS},
    "zh": dict(
        zip(KEYS, ["动作", "设备", "房间", "亮度", "颜色", "温度", "速度", "音量", "音乐", "时间", "多久"], strict=True)
    ),
}
_ENGLISH_ASKED = 0.7


def _ask_language(rng: random.Random) -> str:
    return "en" if rng.random() < _ENGLISH_ASKED else "zh"


def _wish(rng: random.Random, language: str = "") -> tuple[str, str, Action]:
    intent, action = random_action(rng)
    return intent, sentence(rng, language or rng.choice(LANGUAGES), WORDINGS, intent, action), action


def _asked_keys(rng: random.Random, action: Action) -> list[str]:
    """The stated keys in any order, now and then with one that is not stated."""
    keys = list(action)
    if rng.random() < 0.25:
        keys.append(rng.choice([key for key in KEYS if key not in action]))
    rng.shuffle(keys)
    return keys


def questions(rng: random.Random) -> Document:
    """A wish, then questions about it one by one."""
    _, said, action = _wish(rng)
    language = _ask_language(rng)
    turns: list[str] = []
    for key in _asked_keys(rng, action)[:5]:
        turns += [rng.choice(QUESTIONS[key][language]), plain(language, key, action.get(key))]
    turns[0] = f"{said}\n{turns[0]}"
    return chat(*turns)


_PAIR_FORMS = ("{key}: {value}", "{key} {value}", "{key} = {value}", "{value}")
_SEPARATORS = (", ", "; ", "\n", " / ")


def notes(rng: random.Random) -> Document:
    """A wish and a list of fields, noted down in that order."""
    _, said, action = _wish(rng)
    language = _ask_language(rng)
    keys = _asked_keys(rng, action)
    if rng.random() < 0.5:
        keys.sort(key=KEYS.index)
    keys = keys[: rng.choice((3, 4, 8, 8))]
    form, separator = rng.choice(_PAIR_FORMS), rng.choice(_SEPARATORS)
    wanted = ", ".join(FIELDS[language][key] for key in keys)
    pairs = [form.format(key=FIELDS[language][key], value=plain(language, key, action.get(key))) for key in keys]
    lines = [said, f"{wanted}?"]
    if rng.random() < 0.3:
        lines.reverse()
    return chat("\n".join(lines), separator.join(pairs))


_EVERYTHING = {
    "en": ("What is said?", "Note all that is said.", "Everything stated?"),
    "zh": ("说了什么？", "把说到的都记下来。"),
}


def summary(rng: random.Random) -> Document:
    """A wish, and all that it states noted down in the order of KEYS; what it leaves unsaid is left out."""
    _, said, action = _wish(rng)
    language = _ask_language(rng)
    form, separator = rng.choice(_PAIR_FORMS), rng.choice(_SEPARATORS)
    pairs = [form.format(key=FIELDS[language][key], value=plain(language, key, action[key])) for key in action]
    return chat(f"{said}\n{rng.choice(_EVERYTHING[language])}", separator.join(pairs))


_CONFIRMED_VALUE = {
    "en": {
        "level": " to {}%",
        "volume": " to volume {}%",
        "color": " to {}",
        "temperature": " to {} degrees",
        "speed": " to {} speed",
        "genre": " with {}",
    },
    "zh": {
        "level": "到{}%",
        "volume": "音量{}%",
        "color": "为{}",
        "temperature": "到{}度",
        "speed": "到{}",
        "genre": "{}",
    },
}


def _confirm_in_english(parts: dict[str, str], value: str) -> str:
    when = f" at {parts['time']}" if "time" in parts else f" in {parts['in']}" if "in" in parts else ""
    device = f" {parts['device']}" if "device" in parts else ""
    room = f", {parts['room']}" if "room" in parts else ""
    return f"OK, {parts['action']}{device}{room}{value}{when}."


def _confirm_in_chinese(parts: dict[str, str], value: str) -> str:
    when = parts.get("time", "") or (f"{parts['in']}后" if "in" in parts else "")
    return f"好的，{when}{parts['action']}{parts.get('room', '')}{parts.get('device', '')}{value}。"


_CONFIRM = {"en": _confirm_in_english, "zh": _confirm_in_chinese}


def confirmation(rng: random.Random) -> Document:
    """A wish and nothing else; the assistant says in plain words what it has understood."""
    language = rng.choice(LANGUAGES)
    _, said, action = _wish(rng, language)
    parts = {key: plain(language, key, stated) for key, stated in action.items()}
    forms = _CONFIRMED_VALUE[language]
    value = "".join(forms[key].format(part) for key, part in parts.items() if key in forms)
    return chat(said, _CONFIRM[language](parts, value))


# --------------------------------------------------------------------------------------- two ways to say a thing

_SAY_AGAIN = {
    "en": ("Say it in English: ", "In English, please: ", "English: "),
    "zh": ("用中文说：", "翻译成中文：", "中文："),
}


def restatement(rng: random.Random) -> Document:
    """A wish said again in other words or in the other language."""
    intent, said, action = _wish(rng)
    language = rng.choice(LANGUAGES)
    again = sentence(rng, language, WORDINGS, intent, action)
    return chat(rng.choice(_SAY_AGAIN[language]) + said, again)


_EASY = {"device": DEVICES, "room": ROOMS, "color": COLORS, "speed": SPEEDS, "genre": GENRES}
_DRILLED = ("device", "room", "color", "speed", "genre", "level", "temperature", "time", "time", "in", "span")


def _random_value(rng: random.Random, key: str) -> Value:
    if key in _EASY:
        return rng.choice(tuple(_EASY[key]))
    return rng.choice(SPAN_VALUES) if key == "span" else VALUES[key](rng)


def drill(rng: random.Random) -> Document:
    """Words to plain values: 三成 is 30, half past seven in the evening is 19:30."""
    language = _ask_language(rng)
    lines = []
    for _ in range(rng.randint(3, 6)):
        key = rng.choice(_DRILLED)
        value = _random_value(rng, key)
        lines.append((name(rng, rng.choice(LANGUAGES), key, value), plain(language, key, value)))
    return chat("\n".join(word for word, _ in lines), "\n".join(value for _, value in lines))


# ---------------------------------------------------------------------------------- JSON, of anything but homes

_PEOPLE = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Li",
    "Wang",
    "Mei",
    "Tom",
    "Yuki",
    "小明",
    "小红",
    "李雷",
    "王芳",
    "张伟",
]
_CITIES = ["Paris", "London", "Beijing", "Shanghai", "Tokyo", "Madrid", "Rome", "北京", "上海", "广州", "杭州"]
_GOODS = ["apple", "tea", "bread", "kettle", "chair", "book", "pen", "phone", "radio", "bicycle", "茶", "书", "苹果"]
_STATES = ["on", "off", "open", "closed", "new", "old", "set", "sold", "lost", "ready", "low", "high"]


def _clock(rng: random.Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"


RECORD_FIELDS: dict[str, Callable[[random.Random], Value]] = {
    "name": lambda rng: rng.choice(_PEOPLE),
    "city": lambda rng: rng.choice(_CITIES),
    "age": lambda rng: rng.randrange(100),
    "price": lambda rng: rng.randrange(200),
    "item": lambda rng: rng.choice(_GOODS),
    "device": lambda rng: rng.choice(_GOODS),
    "state": lambda rng: rng.choice(_STATES),
    "action": lambda rng: rng.choice(("buy", "sell", "lend", "send")),
    "room": lambda rng: rng.choice(("101", "204", "317", "hall", "library")),
    "level": lambda rng: rng.randrange(1, 100),
    "color": lambda rng: rng.choice(tuple(COLORS)),
    "temperature": lambda rng: rng.randrange(-10, 40),
    "speed": lambda rng: rng.choice(("low", "medium", "high", "slow", "fast")),
    "volume": lambda rng: rng.randrange(1, 100),
    "genre": lambda rng: rng.choice(("novel", "drama", "poem", *GENRES)),
    "time": _clock,
    "in": lambda rng: rng.choice(("box", "bag", "10m", "2h", "30s")),
}
_RECORD_REQUESTS = ("as JSON", "JSON", "write JSON", "写成JSON")


def record(rng: random.Random) -> Document:
    """Fields of some record, shuffled together at random, rewritten as compact JSON."""
    keys = rng.sample(tuple(RECORD_FIELDS), rng.randint(2, 6))
    values = {key: RECORD_FIELDS[key](rng) for key in keys}
    text = ", ".join(f"{key} {value}" for key, value in values.items())
    answer = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return chat(f"{text}\n{rng.choice(_RECORD_REQUESTS)}", answer)


# --------------------------------------------------------------------------------------------------- stories

_STORY = {
    "en": ('{who} said: "{said}" Then {who} went to {city}.', "In {city}, {who} often says: {said}", "{who}: {said}"),
    "zh": ("{who}说：“{said}”然后去了{city}。", "在{city}，{who}常说：{said}", "{who}：{said}"),
}


def story(rng: random.Random) -> Document:
    """Running text in which people say what they wish."""
    language = rng.choice(LANGUAGES)
    lines = []
    for _ in range(rng.randint(1, 3)):
        _, said, _ = _wish(rng, language)
        lines.append(rng.choice(_STORY[language]).format(who=rng.choice(_PEOPLE), city=rng.choice(_CITIES), said=said))
    return [Turn(role="text", content=" ".join(lines))]


# ------------------------------------------------------------------------------------------------- the corpus

KINDS: tuple[tuple[Callable[[random.Random], Document], int], ...] = (
    (questions, 20),
    (notes, 20),
    (summary, 16),
    (confirmation, 12),
    (restatement, 10),
    (drill, 12),
    (record, 8),
    (story, 2),
)


def documents(seed: int, count: int) -> Iterator[Document]:
    """The corpus: so many documents, the same ones for the same seed."""
    rng = random.Random(seed)
    makers, weights = zip(*KINDS, strict=True)
    for _ in range(count):
        yield rng.choices(makers, weights)[0](rng)


def main() -> None:
    """Write documents as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: standard output")
    options = parser.parse_args()
    lines = (json.dumps(document, ensure_ascii=False) for document in documents(options.seed, options.documents))
    if options.out:
        options.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
