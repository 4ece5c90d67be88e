"""The bytes of llama.cpp's own chain: convert_hf_to_gguf.py of the pinned source, then llama-quantize's function.

Without an adapter every tensor is theirs to the byte, in every family that the converter can read, for f32, f16, bf16
and q8_0, and for every mix in five of them. Metadata and vocabularies are compared key by key: what differs stands in a
table with its reason, and anything else fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune_converters import gguf
from edgetune_converters.quantization.recipes import RECIPES
from edgetune_converters.tokenizers import convert as tokenizers
from tests.converters import (
    family_models,
    gguf_roundtrip,
    llama_cpp_source,
    reference_tools,
    runtime,
    sentencepiece_files,
    tiny,
)
from tests.export_requests import export

pytestmark = pytest.mark.slow

TYPES = ("f32", "f16", "bf16", "q8_0")
# cases that the converter cannot read, with what it says
UNREADABLE = {
    "baichuan": "recurses without end",
    "baichuan-13b": "the same",
    "falcon-7b": "takes the number of key heads that transformers states for a model of one key head",
    "falcon-before": "as falcon-7b",
    "granitemoe": "has no rope factors for this family",
    "mixtral-fused": "knows experts of transformers 4 only",
    "stablelm-12b": "looks for its norms among thirty-two heads",
}
# what real checkpoints have in their files, and a transformers of today no longer writes
WORDS: Mapping[str, dict[str, Any]] = {
    "neox*": {"rotary_pct": 0.5},
    "gpt2*": {"n_ctx": 640},
    "command-r7b": {"rotary_pct": 1.0},
    "mpt": {"architectures": ["MPTForCausalLM"]},
}
ADDED = {"glm4": ["<|user|>"]}


def _as_published(name: str, directory: Path) -> None:
    """Bring a random model nearer to the checkpoints that the converter was written for."""
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for pattern, words in WORDS.items():
        config |= words if fnmatch(name, pattern) else {}
    path.write_text(json.dumps(config), "utf-8")
    path = directory / "tokenizer_config.json"
    kind = "GPT2Tokenizer" if name.startswith("phi3") else "PreTrainedTokenizerFast"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"tokenizer_class": kind}), "utf-8")
    path = directory / "tokenizer.json"
    loaded = json.loads(path.read_text("utf-8"))
    for text in ADDED.get(name, []):
        number = 1 + max(entry["id"] for entry in loaded["added_tokens"])
        loaded["added_tokens"].append(loaded["added_tokens"][0] | {"id": number, "content": text})
    path.write_text(json.dumps(loaded), "utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME.TYPE.gguf by the converter and NAME/ for every family, all in one process."""
    folder = tmp_path_factory.mktemp("made")
    jobs = []
    for name in family_models.CASES:
        _as_published(name, family_models.base(name, folder / name))
        if name not in UNREADABLE:
            jobs += [
                reference_tools.Job(str(folder / name), kind, str(folder / f"{name}.{kind}.gguf")) for kind in TYPES
            ]
    failures = reference_tools.convert(jobs)
    assert not failures, "add to UNREADABLE, with the reason, a case that the converter cannot read"
    return folder


READABLE = [name for name in family_models.CASES if name not in UNREADABLE]


@pytest.mark.parametrize("name", READABLE)
def test_every_tensor_is_the_converters(name: str, made: Path, tmp_path: Path) -> None:
    export(made / name, {kind: tmp_path / f"{kind}.gguf" for kind in TYPES}, allow_fallback=True)
    for kind in TYPES:
        ours, theirs = gguf.read(tmp_path / f"{kind}.gguf"), gguf.read(made / f"{name}.{kind}.gguf")
        _assert_same_tensors(ours, theirs)
        assert list(_differences(name, ours.metadata, theirs.metadata)) == []


def _assert_same_tensors(ours: gguf.GgufFile, theirs: gguf.GgufFile) -> None:
    one, other = ({entry.name: entry for entry in file.tensors} for file in (ours, theirs))
    assert one.keys() == other.keys()
    for name, entry in one.items():
        rows = len(theirs.tensor(name)) if name == "token_embd.weight" and "gemma3" in str(theirs.path) else None
        assert entry.type == other[name].type, name
        # a shared router of one row is a vector here and a matrix of one row there: the same bytes
        mine, peers = ours.tensor(name)[:rows], theirs.tensor(name)
        assert mine.tobytes() == peers.tobytes(), name


# -- metadata ----------------------------------------------------------------------------------------------------------

# key, or the part after the architecture -> (cases, why ours is as it is, what must hold of ours and theirs)
Rule = Callable[[Any, Any], bool]


def _only_ours(ours: Any, theirs: Any) -> bool:
    return theirs is None


def _only_theirs(ours: Any, theirs: Any) -> bool:
    return ours is None


def _any(ours: Any, theirs: Any) -> bool:
    return True


DIFFERENCES: tuple[tuple[str, str, str, Rule], ...] = (
    ("general.name", "*", "the directory's name as it is, theirs with capitals", _any),
    ("general.basename", "*", "guessed from the name, for file names of the hub", _only_theirs),
    ("general.size_label", "gemma3*", "with the rows of the embedding that have no token", lambda ours, _: bool(ours)),
    ("general.finetune", "*", "the same", _only_theirs),
    ("general.version", "*", "the same", _only_theirs),
    ("general.file_type", "*", "which the converter leaves out of GPT-NeoX and MPT", _only_ours),
    ("edgetune.*", "*", "the proof", _only_ours),
    # what llama.cpp assumes where a file says nothing, said
    ("*.vocab_size", "*", "the rows of the embedding", _only_ours),
    ("*.attention.key_length", "*", "the hidden size shared out, or what config.json says", _only_ours),
    ("*.attention.value_length", "*", "the same", _only_ours),
    ("*.attention.head_count_kv", "*", "as many as query heads", _only_ours),
    ("*.rope.dimension_count", "*", "whole heads", _only_ours),
    ("*.rope.freq_base", "*", "10000 where the converter leaves it out", _only_ours),
    ("*.rope.scaling.type", "*", "longrope, which the factors are of; 'none' is what nothing means", _any),
    ("*.attention.sliding_window_pattern", "*", "the layers of config.json; llama.cpp counts otherwise", _only_ours),
    ("*.expert_gating_func", "deepseek*", "softmax or sigmoid", _only_ours),
    ("tokenizer.ggml.add_*_token", "*", "what the tokenizer does, said for both ends", _only_ours),
    # where the converter's file runs otherwise than transformers
    ("*.rope.scaling.attn_factor", "*", "YaRN's attention factor of config.json", _only_ours),
    ("*.rope.scaling.yarn_attn_factor", "qwen2", "llama.cpp reads it for other families only", _only_theirs),
    ("*.context_length", "mistral", "the window, up to which both agree", lambda ours, theirs: ours == 600),
    ("*.context_length", "starcoder2", "the window", lambda ours, theirs: ours == 600),
    ("*.context_length", "falcon*", "of config.json, not 2048 always", lambda ours, theirs: ours == 640),
    ("*.context_length", "bloom", "2048, not the hidden size", lambda ours, theirs: (ours, theirs) == (2048, 72)),
    ("*.attention.head_count_kv", "phi2", "of config.json", lambda ours, theirs: ours == 2),
    ("*.feed_forward_length", "phi2", "of config.json, not four times the hidden size", lambda ours, _: ours == 104),
    ("*.feed_forward_length", "gpt2-narrow*", "the same", lambda ours, theirs: ours == 100),
    ("*.rope.freq_base_swa", "olmo3*", "one base for all layers, checked", _only_theirs),
    # what no reader asks for
    ("*.attention.sliding_window", "phi3*", "0 for none", lambda ours, theirs: (ours, theirs) == (None, 0)),
    ("*.rope.scaling.original_context_length", "phi3", "without scaling it has no meaning", _only_theirs),
    ("*.tensor_data_layout", "falcon*", "of another program", _only_theirs),
    ("tokenizer.ggml.add_space_prefix", "gemma*", "of SentencePiece; this vocabulary is of another kind", _only_theirs),
    ("tokenizer.ggml.*_token_id", "glm4", "numbers of GLM's tokens whatever tokenizer_config.json says", _only_theirs),
    ("tokenizer.ggml.*_token_id", "gemma", "numbers of CodeGemma's tokens whatever the vocabulary", _only_theirs),
    ("tokenizer.ggml.*", "gemma3*", "rows without a token are kept, and typed unused", _any),
)  # fmt: skip


def _differences(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys that differ for no reason in the table."""
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    return [f"{key}: {ours.get(key)!r}, {theirs.get(key)!r}" for key in keys if not _explained(name, key, ours, theirs)]


def _explained(name: str, key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return any(
        fnmatch(key, pattern) and fnmatch(name, cases) and rule(ours.get(key), theirs.get(key))
        for pattern, cases, _, rule in DIFFERENCES
    )


# -- mixes -------------------------------------------------------------------------------------------------------------

_WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9}
_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2}
FLAGSHIPS: dict[str, dict[str, Any]] = {
    "llama": _WIDE | _HEADS | {"head_dim": 32, "num_hidden_layers": 17},
    "qwen2": _WIDE | _HEADS | {"tie_word_embeddings": True},
    "gemma2": _WIDE | _HEADS | {"head_dim": 32, "query_pre_attn_scalar": 32, "num_key_value_heads": 4},
    "phi3": _WIDE | _HEADS,
    "neox": _WIDE | {"num_attention_heads": 8},
    "mixtral": _WIDE | _HEADS | {"head_dim": 32, "num_local_experts": 8},
    "falcon-40b": {"hidden_size": 256, "num_hidden_layers": 9, "num_attention_heads": 8, "num_kv_heads": 2},
}


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_every_mix_is_that_of_their_chain(name: str, tmp_path: Path) -> None:
    """From a bf16 checkpoint, through their bf16 file as users have it."""
    base = family_models.base(name, tmp_path / "base", dtype="bfloat16", **FLAGSHIPS[name])
    _as_published(name, base)
    whole = tmp_path / "theirs.bf16.gguf"
    assert reference_tools.convert([reference_tools.Job(str(base), "bf16", str(whole))]) == {}
    export(base, {kind: tmp_path / f"{kind}.gguf" for kind in RECIPES}, allow_fallback=True)
    for kind, recipe in RECIPES.items():
        theirs = tmp_path / "theirs.gguf"
        runtime.quantize(whole, theirs, recipe.file_type)
        ours, peers = gguf.read(tmp_path / f"{kind}.gguf"), gguf.read(theirs)
        _assert_same_tensors(ours, peers)
        assert list(_differences(name, ours.metadata, peers.metadata)) == []


# -- the factors of Llama 3 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theta", "width", "factor"), [(5e5, 64, 32.0), (5e5, 128, 8.0), (1e6, 128, 16.0)])
def test_rope_factors_of_published_models(theta: float, width: int, factor: float, tmp_path: Path) -> None:
    """Llama 3.2 of 1 B, 3.1 of 8 B and EXAONE 4: frequencies are powers in f32, which round in their own ways."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    base = family_models.base("llama", tmp_path / "base", head_dim=width, rope_parameters=rope)
    assert reference_tools.convert([reference_tools.Job(str(base), "f32", str(tmp_path / "theirs.gguf"))]) == {}
    export(base, {"f32": tmp_path / "ours.gguf"})
    ours, theirs = gguf.read(tmp_path / "ours.gguf"), gguf.read(tmp_path / "theirs.gguf")
    assert np.array_equal(ours.tensor("rope_freqs.weight"), theirs.tensor("rope_freqs.weight"))


# -- vocabularies ------------------------------------------------------------------------------------------------------

# vocabulary -> a case of the family whose way of reading it the converter takes
VOCABULARIES = {
    "llama-bpe": "llama", "qwen2": "qwen2", "qwen35": "qwen2", "gpt-2": "gpt2", "gpt-neox": "neox",
    "falcon": "falcon-40b", "starcoder": "starcoder2", "command-r": "command-r", "deepseek-llm": "llama",
    "deepseek-coder": "llama", "llama-spm": "llama", "mpt": "mpt", "refact": "llama",
}  # fmt: skip
_SAME_CUTS = (
    {"llama-bpe", "smaug-bpe"}, {"gpt-2", "olmo"}, {"smollm", "starcoder", "command-r", "refact"}, {"qwen35", "qwen2"},
)  # fmt: skip


def _with_pieces(file: Path, directory: Path) -> None:
    """tokenizer.model beside tokenizer.json, as the converter wants it for Llama 2."""
    found = gguf.read(file).metadata
    columns: list[Any] = [found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")]
    (directory / "tokenizer.model").write_bytes(sentencepiece_files.model(zip(*columns, strict=True), 2))


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME.gguf by the converter and NAME/ for every vocabulary."""
    folder, source = tmp_path_factory.mktemp("vocabularies"), llama_cpp_source.directory() / "models"
    jobs = []
    for name, case in VOCABULARIES.items():
        (folder / name).mkdir()
        rows = gguf_roundtrip.rebuild(source, name, folder / name).rows
        kind = getattr(tiny.transformers, family_models.CASES[case].config)
        config = kind(**family_models.CASES[case].options | {"vocab_size": rows})
        stated = {key: value for key, value in config.to_dict().items() if not key.endswith("_token_id")}
        architecture = {"gpt2": "GPT2LMHeadModel", "mpt": "MPTForCausalLM"}.get(
            case, type(config).__name__.replace("Config", "ForCausalLM")
        )
        stated["architectures"] = [architecture]
        (folder / name / "config.json").write_text(json.dumps(stated), "utf-8")
        _as_published(case, folder / name)
        if name.endswith("-spm"):
            _with_pieces(source / f"ggml-vocab-{name}.gguf", folder / name)
        jobs.append(reference_tools.Job(str(folder / name), "", str(folder / f"{name}.gguf")))
    assert reference_tools.convert(jobs) == {}
    return folder


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_token_is_the_converters(name: str, vocabularies: Path) -> None:
    stated = json.loads((vocabularies / name / "config.json").read_text("utf-8"))
    made = tokenizers.convert_tokenizer(vocabularies / name, stated["vocab_size"], stated).metadata
    ours: dict[str, Any] = {key: value.data for key, value in made.items()}
    found = gguf.read(vocabularies / f"{name}.gguf").metadata
    theirs: dict[str, Any] = {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    pre = {ours.pop("tokenizer.ggml.pre"), theirs.pop("tokenizer.ggml.pre")}
    assert len(pre) == 1 or any(pre <= alike for alike in _SAME_CUTS), pre
    ours.pop("edgetune.tokenizer.normalizer", None)
    for end in ("bos", "eos"):
        key = f"tokenizer.ggml.add_{end}_token"
        assert ours.pop(key) == theirs.pop(key, False), key
    _assert_same_order(ours.pop("tokenizer.ggml.scores", None), theirs.pop("tokenizer.ggml.scores", None), theirs)
    ours.pop("tokenizer.ggml.add_space_prefix", None)  # llama.cpp's own default where the file is of Llama 2
    for at in _renamed_tokens(ours, theirs):
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            ours[key][at] = theirs[key][at]
    assert ours == theirs


def _assert_same_order(ours: list[float] | None, theirs: list[float] | None, metadata: Mapping[str, Any]) -> None:
    """Scores say which pair is merged first; any numbers in the same order are the same."""
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        normal = [at for at, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 1]
        merged = [at for at in normal if len(metadata["tokenizer.ggml.tokens"][at]) > 1]
        ranked = [ours[at] for at in sorted(merged, key=lambda at: -theirs[at])]
        assert ranked == sorted(ranked, reverse=True)


def _renamed_tokens(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[int]:
    """Plain tokens that read like special ones, which llama.cpp would end a text at: ours have lost their text.

    And DeepSeek's <pad>, an added token that is not special: the converter knows it by its text.
    """
    pairs = zip(ours["tokenizer.ggml.tokens"], theirs["tokenizer.ggml.tokens"], strict=True)
    return [at for at, (one, other) in enumerate(pairs) if one == f"[UNREACHABLE{at}]" or other == "<pad>"]
