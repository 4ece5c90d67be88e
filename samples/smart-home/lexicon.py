"""What a home is made of, and how English and Chinese speak of it.

Shared by the pretraining text (make_corpus.py) and the fine-tuning rows (make_data.py): rooms, devices, numbers,
times. Only the *sentences* around these words differ between the two, and between train and test; they live in
wordings/*.yaml. An action is a plain dictionary whose keys always stand in the order of KEYS.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

Value = str | int
Action = dict[str, Value]

LANGUAGES = ("en", "zh")
KEYS = (
    "action",
    "device",
    "room",
    "level",
    "color",
    "temperature",
    "speed",
    "volume",
    "genre",
    "time",
    "in",
)

# ---------------------------------------------------------------------------------------------------- nouns

ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "bedroom": {"en": ("bedroom",), "zh": ("卧室", "卧房")},
    "living room": {"en": ("living room", "lounge", "sitting room"), "zh": ("客厅", "起居室")},
    "kitchen": {"en": ("kitchen",), "zh": ("厨房",)},
    "bathroom": {"en": ("bathroom",), "zh": ("浴室", "卫生间", "洗手间")},
    "study": {"en": ("study", "home office"), "zh": ("书房",)},
    "nursery": {"en": ("nursery", "children's room"), "zh": ("儿童房", "孩子房间")},
    "dining room": {"en": ("dining room",), "zh": ("餐厅", "饭厅")},
    "hallway": {"en": ("hallway", "corridor"), "zh": ("走廊", "过道")},
    "guest room": {"en": ("guest room", "spare room"), "zh": ("客房",)},
    "basement": {"en": ("basement", "cellar"), "zh": ("地下室",)},
    "garage": {"en": ("garage",), "zh": ("车库",)},
    "balcony": {"en": ("balcony",), "zh": ("阳台",)},
}

DEVICES: dict[str, dict[str, tuple[str, ...]]] = {
    "light": {"en": ("light", "lights", "lamp"), "zh": ("灯", "电灯", "灯光")},
    "fan": {"en": ("fan", "ceiling fan"), "zh": ("风扇", "电扇", "吊扇")},
    "ac": {"en": ("AC", "air conditioner", "air conditioning"), "zh": ("空调", "冷气")},
    "tv": {"en": ("TV", "television"), "zh": ("电视", "电视机")},
    "heater": {"en": ("heater", "radiator"), "zh": ("暖气", "取暖器")},
    "humidifier": {"en": ("humidifier",), "zh": ("加湿器",)},
    "purifier": {"en": ("air purifier", "purifier"), "zh": ("空气净化器", "净化器")},
    "thermostat": {"en": ("thermostat",), "zh": ("温控器", "恒温器")},
    "curtain": {"en": ("curtain", "curtains", "drapes"), "zh": ("窗帘", "帘子")},
    "blinds": {"en": ("blinds", "shades"), "zh": ("百叶窗", "百叶帘")},
    "window": {"en": ("window", "windows"), "zh": ("窗户", "窗子")},
    "garage door": {"en": ("garage door",), "zh": ("车库门",)},
    "front door": {"en": ("front door", "main door"), "zh": ("前门", "大门")},
    "back door": {"en": ("back door", "rear door"), "zh": ("后门",)},
    "speaker": {"en": ("speaker", "stereo"), "zh": ("音箱", "音响")},
    "vacuum": {"en": ("robot vacuum", "vacuum cleaner", "vacuum"), "zh": ("扫地机器人", "扫地机", "吸尘器")},
}

COLORS: dict[str, dict[str, tuple[str, ...]]] = {
    "red": {"en": ("red",), "zh": ("红色",)},
    "orange": {"en": ("orange",), "zh": ("橙色", "橘色")},
    "yellow": {"en": ("yellow",), "zh": ("黄色",)},
    "green": {"en": ("green",), "zh": ("绿色",)},
    "blue": {"en": ("blue",), "zh": ("蓝色",)},
    "purple": {"en": ("purple", "violet"), "zh": ("紫色",)},
    "pink": {"en": ("pink",), "zh": ("粉色", "粉红色")},
    "white": {"en": ("white",), "zh": ("白色",)},
    "warm white": {"en": ("warm white",), "zh": ("暖白色", "暖白")},
}

SPEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "low": {"en": ("low", "low speed"), "zh": ("低速", "低档")},
    "medium": {"en": ("medium", "medium speed"), "zh": ("中速", "中档")},
    "high": {"en": ("high", "high speed"), "zh": ("高速", "高档")},
}

GENRES: dict[str, dict[str, tuple[str, ...]]] = {
    "jazz": {"en": ("jazz", "jazz music"), "zh": ("爵士乐", "爵士")},
    "classical": {"en": ("classical music",), "zh": ("古典音乐", "古典乐")},
    "pop": {"en": ("pop", "pop music", "pop songs"), "zh": ("流行音乐", "流行歌")},
    "rock": {"en": ("rock", "rock music"), "zh": ("摇滚乐", "摇滚")},
    "folk": {"en": ("folk music", "folk songs"), "zh": ("民谣", "民歌")},
    "piano": {"en": ("piano music",), "zh": ("钢琴曲",)},
}

# -------------------------------------------------------------------------------------- numbers, times, spans

_EN_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_EN_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ZH_DIGITS = "零一二三四五六七八九"


def en_number(number: int) -> str:
    """0..100 in English words."""
    if number == 100:
        return "one hundred"
    if number < 20:
        return _EN_ONES[number]
    tens, ones = divmod(number, 10)
    return f"{_EN_TENS[tens]}-{_EN_ONES[ones]}" if ones else _EN_TENS[tens]


def zh_number(number: int) -> str:
    """0..100 in Chinese numerals, as read aloud."""
    if number == 100:
        return "一百"
    tens, ones = divmod(number, 10)
    head = "" if tens == 0 else "十" if tens == 1 else f"{_ZH_DIGITS[tens]}十"
    return head + (_ZH_DIGITS[ones] if ones or not tens else "")


def zh_count(number: int) -> str:
    """A Chinese numeral before a measure word: two is 两, not 二."""
    return "两" if number == 2 else zh_number(number)


def level_names(level: int) -> dict[str, tuple[str, ...]]:
    """The ways to say a percentage: digits, words, and the fractions that people really use."""
    fractions = {
        25: (("a quarter",), ("四分之一",)),
        50: (("half",), ("一半", "五成")),
        75: (("three quarters",), ("四分之三",)),
    }
    english, chinese = fractions.get(level, ((), ()))
    if level % 10 == 0 and level not in (50, 100):
        chinese = (f"{_ZH_DIGITS[level // 10]}成",)
    percent = "百分之百" if level == 100 else f"百分之{zh_number(level)}"
    return {
        "en": (f"{level}%", f"{level} percent", f"{en_number(level)} percent", *english),
        "zh": (f"{level}%", percent, *chinese),
    }


def temperature_names(degrees: int) -> dict[str, tuple[str, ...]]:
    """The ways to say a temperature in Celsius."""
    return {
        "en": (f"{degrees} degrees", f"{degrees}°C", f"{en_number(degrees)} degrees"),
        "zh": (f"{degrees}度", f"{zh_number(degrees)}度", f"{degrees}°C"),
    }


_EN_DAYPARTS = ((11, "in the morning"), (17, "in the afternoon"), (20, "in the evening"), (23, "at night"))
_ZH_DAYPARTS = (
    (4, ("凌晨",)),
    (7, ("早上", "清晨")),
    (10, ("上午", "早上")),
    (11, ("上午",)),
    (12, ("中午",)),
    (16, ("下午",)),
    (17, ("下午", "傍晚")),
    (23, ("晚上", "今晚")),
)
_Part = TypeVar("_Part")


def _daypart(table: Sequence[tuple[int, _Part]], hour: int) -> _Part:
    return next(part for last, part in table if hour <= last)


def _en_clock_words(hour: int, minute: int) -> tuple[str, ...]:
    """The spoken clock on twelve hours: half past seven, quarter to eight, seven thirty."""
    this, following = (en_number(h % 12 or 12) for h in (hour, hour + 1))
    if minute == 0:
        return this, f"{this} o'clock"
    read = f"{this} oh five" if minute == 5 else f"{this} {en_number(minute)}"
    past = {15: "quarter past", 30: "half past"}
    if minute in past:
        return f"{past[minute]} {this}", read
    if minute < 30:
        return f"{en_number(minute)} past {this}", read
    to = "quarter" if minute == 45 else en_number(60 - minute)
    return f"{to} to {following}", read


def _zh_clock_words(hour: int, minute: int) -> tuple[str, ...]:
    head = f"{zh_count(hour % 12 or 12) if hour else zh_number(12)}点"
    digits = f"{hour % 12 or 12}点"
    if minute == 0:
        return head, digits, f"{head}整"
    if minute == 30:
        return f"{head}半", f"{digits}半", f"{head}三十分"
    if minute in (15, 45):
        quarter = "一刻" if minute == 15 else "三刻"
        return f"{head}{quarter}", f"{digits}{minute}分"
    return (f"{head}零五分" if minute == 5 else f"{head}{zh_number(minute)}分"), f"{digits}{minute}分"


def time_names(time: str) -> dict[str, tuple[str, ...]]:
    """The ways to say a time of day, each with enough in it to know the hour out of 24."""
    hour, minute = (int(part) for part in time.split(":"))
    suffix = "am" if hour < 12 else "pm"
    clock = f"{hour % 12 or 12}" + (f":{minute:02d}" if minute else "")
    english = [f"at {clock}{suffix}", f"at {clock} {suffix}", f"at {time}"]
    english += [f"at {words} {_daypart(_EN_DAYPARTS, hour)}" for words in _en_clock_words(hour, minute)]
    if hour >= 18:
        english += [f"tonight at {_en_clock_words(hour, minute)[0]}", f"at {clock} tonight"]
    chinese = [time] + [
        part + words for part in _daypart(_ZH_DAYPARTS, hour) for words in _zh_clock_words(hour, minute)
    ]
    if minute == 0 and hour in (0, 12):
        english.append("at noon" if hour else "at midnight")
        chinese.append("正午" if hour else "半夜十二点")
    return {"en": tuple(english), "zh": tuple(chinese)}


_SPANS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "15m": (("a quarter of an hour",), ("一刻钟",)),
    "30m": (("half an hour",), ("半小时", "半个小时")),
    "90m": (("an hour and a half",), ("一个半小时",)),
    "1h": (("an hour",), ("一小时",)),
}


def span_names(span: str) -> dict[str, tuple[str, ...]]:
    """The ways to say a length of time such as 10m, 2h or 30s."""
    count, unit = int(span[:-1]), span[-1]
    english, chinese = {"s": ("second", "秒"), "m": ("minute", "分钟"), "h": ("hour", "个小时")}[unit]
    plural = english if count == 1 else f"{english}s"
    extra_english, extra_chinese = _SPANS.get(span, ((), ()))
    return {
        "en": (f"{count} {plural}", f"{en_number(count)} {plural}", *extra_english),
        "zh": (f"{count}{chinese}", f"{zh_count(count)}{chinese}", *extra_chinese),
    }


def delay_names(span: str) -> dict[str, tuple[str, ...]]:
    """The ways to say that something happens after a length of time."""
    spans = span_names(span)
    return {
        "en": tuple(form.format(s) for s in spans["en"] for form in ("in {}", "after {}", "{} from now")),
        "zh": tuple(form.format(s) for s in spans["zh"] for form in ("{}后", "{}以后", "过{}")),
    }


def _from(table: Mapping[str, dict[str, tuple[str, ...]]]) -> Callable[[Value], dict[str, tuple[str, ...]]]:
    return lambda value: table[str(value)]


NAMES: dict[str, Callable[[Value], dict[str, tuple[str, ...]]]] = {
    "device": _from(DEVICES),
    "room": _from(ROOMS),
    "level": lambda value: level_names(int(value)),
    "volume": lambda value: level_names(int(value)),
    "color": _from(COLORS),
    "temperature": lambda value: temperature_names(int(value)),
    "speed": _from(SPEEDS),
    "genre": _from(GENRES),
    "time": lambda value: time_names(str(value)),
    "in": lambda value: delay_names(str(value)),
    "span": lambda value: span_names(str(value)),
}


def name(rng: random.Random, language: str, key: str, value: Value) -> str:
    """One way, chosen at random, to say a value in a language."""
    return rng.choice(NAMES[key](value)[language])


# --------------------------------------------------------------------------------------------------- actions

SPAN_VALUES = tuple(
    [f"{m}m" for m in (1, 2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 35, 40, 45, 50, 90)]
    + [f"{h}h" for h in (1, 2, 3, 4, 5, 6, 8)]
    + [f"{s}s" for s in (10, 20, 30, 45)]
)
MINUTES = (0,) * 8 + (30,) * 5 + (15, 15, 45, 45) + (5, 10, 20, 25, 35, 40, 50, 55)
HOURS = tuple(range(24)) + tuple(range(6, 24))


def random_time(rng: random.Random) -> str:
    """A time of day; full and half hours in daytime are likelier, as in life."""
    return f"{rng.choice(HOURS):02d}:{rng.choice(MINUTES):02d}"


VALUES: dict[str, Callable[[random.Random], Value]] = {
    "level": lambda rng: rng.randrange(5, 101, 5),
    "volume": lambda rng: rng.randrange(5, 101, 5),
    "color": lambda rng: rng.choice(tuple(COLORS)),
    "temperature": lambda rng: rng.randrange(16, 31),
    "speed": lambda rng: rng.choice(tuple(SPEEDS)),
    "genre": lambda rng: rng.choice(tuple(GENRES)),
    "time": random_time,
    "in": lambda rng: rng.choice(SPAN_VALUES),
}


@dataclass(frozen=True)
class Intent:
    """A kind of wish: which action it becomes, on which devices, with which value, and when it may happen."""

    action: str
    devices: tuple[str, ...] = ()
    value: str = ""
    when: tuple[str, ...] = ("", "", "time", "in")  # drawn from evenly; "" is "now"
    weight: int = 2


_NOW = ("",)
INTENTS: dict[str, Intent] = {
    "on": Intent("on", ("light", "fan", "ac", "tv", "heater", "humidifier", "purifier"), weight=4),
    "off": Intent("off", ("light", "fan", "ac", "tv", "heater", "humidifier", "purifier"), weight=4),
    "brightness": Intent("set", ("light",), "level", weight=4),
    "color": Intent("set", ("light",), "color", weight=3),
    "temperature": Intent("set", ("thermostat", "ac", "heater"), "temperature", weight=4),
    "speed": Intent("set", ("fan",), "speed"),
    "position": Intent("set", ("curtain", "blinds"), "level"),
    "open": Intent("open", ("curtain", "blinds", "window", "garage door")),
    "close": Intent("close", ("curtain", "blinds", "window", "garage door")),
    "lock": Intent("lock", ("front door", "back door")),
    "unlock": Intent("unlock", ("front door", "back door")),
    "play": Intent("play", ("speaker",), "genre", weight=3),
    "stop": Intent("stop", ("speaker",), weight=1),
    "volume": Intent("set", ("speaker",), "volume"),
    "clean": Intent("start", ("vacuum",)),
    "query_on": Intent("query", ("light", "fan", "ac", "tv", "heater", "humidifier"), when=_NOW),
    "query_open": Intent("query", ("curtain", "window", "garage door"), when=_NOW, weight=1),
    "query_lock": Intent("query", ("front door", "back door"), when=_NOW, weight=1),
    "query_temperature": Intent("query", ("thermostat",), when=_NOW, weight=1),
    "timer": Intent("timer", when=("in",)),
    "alarm": Intent("alarm", when=("time",)),
}
ROOMLESS = ("garage door", "front door", "back door")  # their place is in their name
UNKNOWN_ROOM = 0.15  # how often a sentence leaves the room unsaid


def random_action(rng: random.Random) -> tuple[str, Action]:
    """An intent's name and an action of that kind, keys in the order of KEYS."""
    intent_name = rng.choices(tuple(INTENTS), [intent.weight for intent in INTENTS.values()])[0]
    intent = INTENTS[intent_name]
    action: Action = {"action": intent.action}
    if intent.devices:
        action["device"] = rng.choice(intent.devices)
        if action["device"] not in ROOMLESS and rng.random() >= UNKNOWN_ROOM:
            action["room"] = rng.choice(tuple(ROOMS))
    for key in (intent.value, rng.choice(intent.when)):
        if key:
            action[key] = VALUES[key](rng)
    return intent_name, action


def to_json(action: Action) -> str:
    """The compact JSON text of an action: what the fine-tuned model has to answer."""
    return json.dumps(action, ensure_ascii=False, separators=(",", ":"))


# ------------------------------------------------------------------------------------------------- sentences

_NOUN_PHRASES = {
    "en": ("the {room} {device}", "the {device} in the {room}", "the {room} {device}", "the {device} of the {room}"),
    "zh": ("{room}的{device}", "{room}{device}", "{room}里的{device}"),
}
_ON_THE = ("balcony",)


def slots(rng: random.Random, language: str, action: Action) -> dict[str, str]:
    """Every piece of a sentence that an action can fill, put into words."""
    words = {key: name(rng, language, key, value) for key, value in action.items() if key != "action"}
    words["when"] = words.pop("time", "") or words.pop("in", "")
    if "in" in action:
        words["span"] = name(rng, language, "span", action["in"])
    device, room = words.get("device", ""), words.get("room", "")
    words["is"] = "are" if device.endswith("s") else "is"
    words["np"] = device if language == "zh" else f"the {device}"
    words["area"] = room or "地板" if language == "zh" else f"the {room or 'floor'}"
    words["place"] = ""
    if room:
        words["np"] = rng.choice(_NOUN_PHRASES[language]).format(room=room, device=device)
        preposition = "on" if action["room"] in _ON_THE else "in"
        words["place"] = f"在{room}" if language == "zh" else f"{preposition} the {room}"
    return words


@dataclass(frozen=True)
class Wordings:
    """The sentence templates of one corpus: carriers around the cores of commands, and whole sentences."""

    carriers: Mapping[str, Sequence[str]]
    cores: Mapping[str, Mapping[str, Sequence[str]]]
    whole: Mapping[str, Mapping[str, Sequence[str]]]

    def templates(self) -> set[str]:
        """Every template, for the check that no two corpora share one."""
        tables = [self.carriers, *self.cores.values(), *self.whole.values()]
        return {template for table in tables for templates in table.values() for template in templates}

    def pick(self, rng: random.Random, language: str, intent: str, timed: bool) -> str:
        """A template of a whole sentence for an intent, with a place for the time exactly if one is to be stated."""
        whole = [t for t in self.whole.get(intent, {}).get(language, ()) if _timed(t) == timed]
        cores = self.cores.get(intent, {}).get(language, ())
        if whole and (not cores or rng.random() < WHOLE_SHARE):
            return rng.choice(whole)
        carriers = [c for c in self.carriers[language] if _timed(c) == timed]
        return rng.choice(carriers).replace("{core}", rng.choice(cores))


WHOLE_SHARE = 0.25  # how often a command is a sentence of its own rather than a carrier around a core


def read_wordings(split: str) -> Wordings:
    """Read wordings/SPLIT.yaml."""
    path = Path(__file__).parent / "wordings" / f"{split}.yaml"
    return Wordings(**yaml.safe_load(path.read_text(encoding="utf-8")))


def _timed(template: str) -> bool:
    return "{when}" in template or "{span}" in template


def sentence(rng: random.Random, language: str, wordings: Wordings, intent: str, action: Action) -> str:
    """Say an action in a language, in one of the wordings."""
    words = slots(rng, language, action)
    text = wordings.pick(rng, language, intent, timed=bool(words["when"])).format(**words)
    text = re.sub(r"\s+(?=[\s,.?]|$)", "", text).strip()  # a room left unsaid leaves a space too many
    return text[0].upper() + text[1:] if rng.random() < CAPITALISED else text


CAPITALISED = 0.7  # the rest is typed in lower case, as on a phone
