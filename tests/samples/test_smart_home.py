"""The smart-home sample: data as generated, splits apart, and a base that is a sound checkpoint."""

import importlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer, pre_tokenizers

from edgetune.config import load_config

SAMPLE = Path(__file__).parents[2] / "samples" / "smart-home"
BASE = SAMPLE / "base"
SPLITS = ("train", "validation", "test")
IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

sys.path.insert(0, str(SAMPLE))
lexicon = importlib.import_module("lexicon")
make_corpus = importlib.import_module("make_corpus")
make_data = importlib.import_module("make_data")


def rows(split: str) -> list[tuple[str, str]]:
    """(sentence, answer) of every row of a committed split."""
    lines = (SAMPLE / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in conversations)
    return [(user["content"], assistant["content"]) for user, assistant in conversations]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


# ------------------------------------------------------------------------------------------------------ data


def test_generator_reproduces_the_committed_rows(tmp_path: Path) -> None:
    make_data.write_splits(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (SAMPLE / "data" / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("corpus", "train"), ("corpus", "test")])
def test_wordings_are_disjoint(one: str, other: str) -> None:
    def normal(split: str) -> set[str]:
        return {template.strip(" .。,，").lower() for template in lexicon.read_wordings(split).templates()} - {"{core}"}

    assert not normal(one) & normal(other)


def test_no_sentence_is_used_twice() -> None:
    counts = Counter(sentence.lower() for split in SPLITS for sentence, _ in rows(split))
    assert [sentence for sentence, count in counts.items() if count > 1] == []


def test_half_of_every_split_is_chinese() -> None:
    for split in SPLITS:
        chinese = sum(any("\u4e00" <= letter <= "\u9fff" for letter in sentence) for sentence, _ in rows(split))
        assert chinese == len(rows(split)) // 2


def test_every_intent_is_tested_in_both_languages() -> None:
    for split in ("corpus", "train", "test"):
        wordings = lexicon.read_wordings(split)
        for intent in lexicon.INTENTS:
            for language in lexicon.LANGUAGES:
                said = wordings.cores.get(intent, {}).get(language) or wordings.whole.get(intent, {}).get(language)
                assert said, f"{split}: {intent} in {language}"


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_compact_json_with_keys_in_order(split: str) -> None:
    for _, answer in rows(split):
        action = json.loads(answer)
        assert answer == lexicon.to_json(action)
        assert list(action) == [key for key in lexicon.KEYS if key in action]
        assert action["action"] in {intent.action for intent in lexicon.INTENTS.values()}
        assert action.get("device", "light") in lexicon.DEVICES
        assert action.get("room", "bedroom") in lexicon.ROOMS


def test_config_is_valid_and_its_files_exist() -> None:
    config = load_config(SAMPLE / "config.yaml")
    for path in (config.base, config.data.train, config.data.validation, config.data.test):
        assert isinstance(path, str)
        assert (SAMPLE / path).exists() or Path(path).exists()


# ---------------------------------------------------------------------------------------------------- corpus


def test_corpus_is_the_same_for_the_same_seed() -> None:
    assert list(make_corpus.documents(5, 50)) == list(make_corpus.documents(5, 50))
    assert list(make_corpus.documents(5, 50)) != list(make_corpus.documents(6, 50))


def test_corpus_never_shows_an_action_in_json() -> None:
    actions = {intent.action for intent in lexicon.INTENTS.values()}
    for document in make_corpus.documents(0, 5000):
        for turn in document:
            if turn["content"].startswith("{"):
                assert json.loads(turn["content"]).get("action") not in actions


@pytest.mark.parametrize(
    ("key", "value", "language", "said"),
    [
        ("level", 30, "zh", "三成"),
        ("level", 30, "zh", "百分之三十"),
        ("level", 50, "en", "half"),
        ("time", "19:30", "en", "at half past seven in the evening"),
        ("time", "19:30", "zh", "晚上七点半"),
        ("time", "14:00", "zh", "下午两点"),
        ("time", "23:45", "en", "at quarter to twelve at night"),
        ("time", "12:00", "en", "at noon"),
        ("in", "30m", "zh", "半小时后"),
        ("in", "2h", "en", "in two hours"),
        ("temperature", 22, "en", "twenty-two degrees"),
    ],
)
def test_values_are_said_as_people_say_them(key: str, value: str | int, language: str, said: str) -> None:
    assert said in lexicon.NAMES[key](value)[language]


def test_no_two_values_sound_alike() -> None:
    times = [f"{hour:02d}:{minute:02d}" for hour in range(24) for minute in range(0, 60, 5)]
    values = {"level": range(5, 101, 5), "temperature": range(16, 31), "time": times, "in": lexicon.SPAN_VALUES}
    for key, choices in values.items():
        for language in lexicon.LANGUAGES:
            counts = Counter(said for value in choices for said in set(lexicon.NAMES[key](value)[language]))
            assert [said for said, count in counts.items() if count > 1] == []


# ------------------------------------------------------------------------------------------------------ base


def test_base_is_small_and_fits_k_quants() -> None:
    path = BASE / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, framework="numpy") as checkpoint:
        for name in checkpoint.keys():  # noqa: SIM118  (not a mapping)
            tensor = checkpoint.get_slice(name)
            assert tensor.get_dtype() == "BF16", name
            assert tensor.get_shape()[-1] % 256 == 0, name
        assert "lm_head.weight" not in checkpoint.keys()  # noqa: SIM118


def test_base_agrees_with_itself_on_the_vocabulary(tokenizer: Tokenizer) -> None:
    config = json.loads((BASE / "config.json").read_text())
    generation = json.loads((BASE / "generation_config.json").read_text())
    with safe_open(BASE / "model.safetensors", framework="numpy") as checkpoint:
        rows_of_embedding = checkpoint.get_slice("model.embed_tokens.weight").get_shape()[0]
    assert config["vocab_size"] == tokenizer.get_vocab_size() == rows_of_embedding
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.token_to_id(IM_END)
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.token_to_id(PAD)
    assert config["eos_token_id"] != config["pad_token_id"]


def test_tokenizer_round_trips_anything(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [text for split in SPLITS for row in rows(split)[:50] for text in row]
    texts += ["", " ", "\n\n  tabs\tand\r\nlines  ", "它 isn't 12345 — naïve 🏠 ก็", "<not a token>"]
    texts += ["".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x4E00, 0x9FFF)))) for _ in range(40))]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True).ids) == text


def test_tokenizer_has_every_byte_and_the_qwen2_pre_tokenizer(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
    content = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    assert split["behavior"] == "Isolated"
    assert split["pattern"]["Regex"] == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert (byte_level["add_prefix_space"], byte_level["use_regex"]) == (False, False)
    assert content["normalizer"] is None


def test_special_tokens_are_single_ids(tokenizer: Tokenizer) -> None:
    for token in (PAD, IM_START, IM_END):
        assert tokenizer.encode(token).ids == [tokenizer.token_to_id(token)]


def test_base_loads_and_its_chat_template_renders() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "开灯"},
        {"role": "assistant", "content": "好"},
    ]
    text = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert text == f"{IM_START}system\nBe brief.{IM_END}\n{IM_START}user\n开灯{IM_END}\n{IM_START}assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{text}好{IM_END}\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == (IM_END, PAD)
    assert tokenizer("开灯").input_ids == tokenizer("开灯", add_special_tokens=False).input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    assert model.num_parameters() < 4_000_000
