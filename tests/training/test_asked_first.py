"""What is knowable before training is asked before it: `--dry-run` refuses, and weights are never loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune import cli
from edgetune.config import parse_config
from edgetune.errors import ConfigError
from edgetune.planning.base_model import Base, find_base
from edgetune.training import adapters, environment, loading
from tests.converters import family_models, vocabularies
from tests.data import templates
from tests.training import runs


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with 64 positions, whose layers are transposed matrices and no torch.nn.Linear."""
    import transformers

    base = tmp_path_factory.mktemp("learned") / "base"
    vocabularies.byte_level(base, chat_template=templates.CHATML, pad_token="<|endoftext|>")
    sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 512}
    with environment.silence_libraries():
        config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        transformers.GPT2LMHeadModel(config).save_pretrained(base)
    return base


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""
    monkeypatch.setattr("edgetune.training.fit.load_model", None)


def _dry_run(base: Path, folder: Path, changes: dict[str, Any], *flags: str) -> int:
    values = runs.settings(base, folder)
    for key, value in changes.items():
        is_added = isinstance(value, dict) and "kind" not in value
        values[key] = {**values.get(key, {}), **value} if is_added else value
    config = runs.write_config(folder / "config.yaml", values)
    return cli.run(["train", str(config), "-o", str(folder / "run"), "--dry-run", *flags])


LONG = {"prompt": "lamp " * 400, "completion": "red"}
PAIR = {"prompt": "lamp", "chosen": "red", "rejected": "blue"}
DIMS = {"prompt": "lamp " * 25, "completion": "red"}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a size of a part": ({"export": {"split_max_size": "2X"}}, "export.split_max_size: '2X' is not a size"),
    "a size of a shard": ({"export": {"max_shard_size": "much"}}, "export.max_shard_size: 'much' is not a size"),
    "a pattern without a tensor": ({"export": {"tensor_types": ["attn_w=q8_0"]}}, "it matches no tensor of this model"),
    "a pattern of vectors": ({"export": {"tensor_types": ["attn_norm=q8_0"]}}, "it matches only vectors such as"),
    "a file that is no imatrix": ({"export": {"imatrix": "train.jsonl"}}, "is not an importance matrix"),
    "a search without int4": ({"export": {"search_types": True}}, "chooses the blocks of int4 in ONNX"),
    "a search with blocks": (
        {"export": {"formats": ["onnx"], "types": ["int4"], "search_types": True, "block_size": 32}},
        "chooses the blocks itself",
    ),
    "no such layer": ({"adapter": {"target_modules": ["q_porj"]}}, "'q_porj' fits no linear layer"),
    "a pattern without a layer": ({"adapter": {"target_modules": "nothing"}}, "'nothing' fits no layer"),
    "a start from a tied output matrix": (
        {"adapter": {"init": "pissa", "target_modules": ["q_proj", "lm_head"]}, "quantization": {"bits": 16}},
        "adapter.init: pissa takes its first values out of the output matrix, which is the embedding too",
    ),
    "a tied output matrix in gguf-lora": (
        {"adapter": {"target_modules": ["lm_head"]}, "export": {"formats": ["gguf-lora"], "types": ["f16"]}},
        "gguf-lora has no place for the change of lm_head.weight: it is tied to the embedding",
    ),
    "the embedding": (
        {"adapter": {"kind": "gralora", "target_modules": ["embed_tokens"]}},
        "GraLoRA cannot adapt model.embed_tokens, which lora, hira, oft can",
    ),
    "a tied embedding in gguf-lora": (
        {"adapter": {"target_modules": ["embed_tokens"]}, "export": {"formats": ["gguf-lora"], "types": ["f16"]}},
        "gguf-lora has no place for the change of model.embed_tokens.weight",
    ),
    "a whole module in gguf-lora": (
        {"adapter": {"modules_to_save": ["lm_head"]}, "export": {"formats": ["gguf-lora"], "types": ["f16"]}},
        "adapter.modules_to_save trains whole modules",
    ),
    "a start from a rounded base": ({"adapter": {"init": "pissa"}}, "adapter.init: pissa moves the base"),
    "DoRA in 8 bits": (
        {"adapter": {"use_dora": True}, "quantization": {"bits": 8}},
        "use_dora cannot be trained with quantization.bits: 8",
    ),
    "LoftQ into the unrounded base": ({"adapter": {"init": "loftq"}}, "set quantization.bits: 4 and export.merge_base"),
    "a layer number too many": ({"adapter": {"layers": [0, 7]}}, "no adapted layer has the number 7"),
    "a pattern for no layer": ({"adapter": {"rank_pattern": {"q_porj": 4}}}, "rank_pattern: 'q_porj' fits no adapted"),
    "no such module": ({"adapter": {"modules_to_save": ["lm_haed"]}}, "'lm_haed' fits no module of the base"),
    "a saved module that is quantized": (
        {"adapter": {"modules_to_save": ["down_proj"]}},
        "adapter.modules_to_save names model.layers.0.mlp.down_proj, whose weights quantization.bits: 4 packs",
    ),
    "a saved block that is quantized": (
        {"adapter": {"modules_to_save": ["self_attn"]}, "quantization": {"bits": 8}},
        "adapter.modules_to_save names model.layers.0.self_attn, whose weights quantization.bits: 8 packs",
    ),
    "a seed below 0": ({"training": {"seed": -5}}, "training.seed is -5: input should be greater than or equal to 0"),
    "a seed of more than 32 bits": ({"training": {"seed": 2**32}}, "training.seed is 4294967296: input should be less"),
    "an encoder larger than the memory": (
        {"adapter": {"kind": "p-tuning", "encoder_hidden_size": 10**7}},
        "P-tuning with these options does not fit into the memory of this machine",
    ),
    "outputs that do not divide": (
        {"adapter": {"kind": "miss", "init": "mini", "mini_r": 7}}, "adapter.mini_r is 7, which does not divide its 64",
    ),
    "a start from more directions than there are": (
        {"adapter": {"init": "lora_ga", "r": 40}, "quantization": {"bits": 16}},
        "adapter.init: lora_ga takes 80 directions for a rank of 40, and it has 64",
    ),
    "a task below 0": (
        {"adapter": {"kind": "multitask-prompt-tuning"}, "export": {"prompt_task": -1}},
        "error: export.prompt_task is -1, and the adapter has 1 tasks, counted from 0: correct it, or leave it out",
    ),
    "no layer left to adapt": (
        {"adapter": {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}}, "which leaves none to adapt",
    ),
    "a feed-forward layer that is not adapted": (
        {"adapter": {"kind": "ia3", "feedforward_modules": ["fc_9"]}}, "'fc_9' fits no adapted layer",
    ),
    "more weights than a layer has": (
        {"adapter": {"kind": "shira", "r": 9999}}, "SHiRA does not fit model.layers.0.self_attn.q_proj [",
    ),
    "more directions than a layer has": (
        {"adapter": {"kind": "psoft", "r": 9999}, "quantization": {"bits": 16}}, "adapter.r is 9999, and it has",
    ),
    "nothing to train": (
        {"adapter": {"kind": "osf", "effective_rank": 9999}, "quantization": {"bits": 16}},
        "nothing of it would be trained",
    ),
    "a wavelet that does not exist": (
        {"adapter": {"kind": "waveft", "wavelet": "db99"}}, "PEFT refuses these options of WaveFT: Wavelet family db99",
    ),
    "a saved output matrix of a reward model": (
        {
            "adapter": {"modules_to_save": ["lm_head"]}, "objective": {"kind": "reward"},
            "data": {"train": "pairs.jsonl", "validation": None, "test": None},
        },
        "adapter.modules_to_save names the output matrix, and objective.kind: reward trains a score head",
    ),
    "options that nothing reads": (
        {
            "adapter": {"kind": "oft", "eps": 0.1, "use_cayley_neumann": False, "num_cayley_neumann_terms": 9},
            "quantization": {"bits": 16, "type": "fp4"}, "export": {"density": 0.5},
        },
        "4 options have no effect: - adapter.eps is 0.1, and adapter.coft: true alone reads it; set that, or leave out "
        "adapter.eps - adapter.num_cayley_neumann_terms is 9, and adapter.use_cayley_neumann: true alone reads it; set "
        "that, or leave out adapter.num_cayley_neumann_terms - quantization.type is fp4, and quantization.bits: 4 "
        "alone reads it; set that, or leave out quantization.type - export.density is for several adapters",
    ),
    "biases that the base does not have": (
        {"adapter": {"bias": "all"}}, "adapter.bias is all, and the base has no biases: it would have no effect",
    ),
    "biases that the adapted layers do not have": (
        {"adapter": {"bias": "adapted"}}, "adapter.bias is adapted, and the adapted layers have no biases",
    ),
    "a start from the base, and biases that it does not have": (
        {"adapter": {"bias": "all", "init": "pissa"}, "quantization": {"bits": 16}},
        "adapter.bias is all, and the base has no biases",
    ),
    "terms of biases that the base does not have": (
        {"adapter": {"kind": "glora", "coupling": "vector"}, "quantization": {"bits": 16}},
        "adapter.coupling is vector, and the adapted layers have no biases",
    ),
    "options of what is switched off": (
        {
            "adapter": {"kind": "lokr", "rank_dropout_scale": True},
            "quantization": {"bits": 16}, "training": {"scheduler": "constant", "warmup_ratio": 0.2},
            "gate": {"pair_flips_max": 0.1, "task_drop_max": 0.1}, "data": {"test": None},
        },
        "4 options have no effect: - adapter.rank_dropout_scale is true, and adapter.rank_dropout leaves out no ranks; "
        "set adapter.rank_dropout above 0, or leave out adapter.rank_dropout_scale - training.warmup_ratio is 0.2, and "
        "training.scheduler: constant has no warm-up; set training.scheduler: constant_with_warmup, or leave out "
        "training.warmup_ratio - gate.pair_flips_max limits the scores of a reward model, and objective.kind: sft "
        "trains none, so that the gate could not be passed; leave it out - gate.task_drop_max limits the drop of the "
        "task score, and there is no data.test",
    ),
    "dropout between the layers of one": (
        {"adapter": {"kind": "p-tuning", "encoder": "lstm", "encoder_layers": 1, "encoder_dropout": 0.1}},
        "adapter.encoder_dropout is 0.1, and it acts between layers, of which adapter.encoder_layers: 1 leaves one",
    ),
    "a task of a method without tasks": (
        {"export": {"prompt_task": "billing"}}, "export.prompt_task is billing, and adapter.kind: lora has no tasks",
    ),
    "a block size that does not fit": (
        {"adapter": {"kind": "gralora", "r": 9, "blocks": 3}}, "GraLoRA does not fit this base",
    ),
    "a long test row": ({"data": {"test": "long.jsonl"}}, "long.jsonl, line 1: the prompt has"),
    "long held-out rows": (
        {"data": {"validation": "long.jsonl"}, "training": {"max_length": 2000}},
        "a held-out row has 821 tokens, and the base was made for 256",
    ),
    "half precision on a CPU": ({"quantization": {"compute_dtype": "float16"}}, "float16 needs a CUDA GPU"),
}  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", REFUSED)
def test_dry_run_refuses(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    changes, words = REFUSED[name]
    (tmp_path / "long.jsonl").write_text(json.dumps(LONG) + "\n")
    (tmp_path / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 20)
    assert _dry_run(base, tmp_path, changes) != 0
    assert words in " ".join(capfd.readouterr().err.split())


@pytest.mark.usefixtures("no_weights")
def test_an_imatrix_that_is_made_later_is_a_warning(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _dry_run(base, tmp_path, {"export": {"imatrix": str(tmp_path / "later.gguf")}}) == 0
    assert "there is no file" in capfd.readouterr().err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"training": {"max_length": 128}, "data": {"train": "dims.jsonl"}},
            "a row has 71 tokens, and the base has 64 positions",
        ),
        (
            {"reference": {"max_new_tokens": 60}},
            "test.jsonl, line 1: the prompt has 33 tokens; with reference.max_new_tokens (60) it passes the base's 64",
        ),
        ({"export": {"merge_base": "nf4"}}, "bitsandbytes rounds no layer of this base to 4 bits"),
        ({"data": {"test": "dims.jsonl"}}, "line 1: the prompt has 67 tokens, and the base was made for 64"),
    ],
)  # fmt: skip
def test_dry_run_refuses_what_a_base_with_learned_positions_cannot_do(
    learned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "dims.jsonl").write_text((json.dumps(DIMS) + "\n") * 2)
    assert _dry_run(learned, tmp_path, changes) != 0
    assert words in " ".join(capfd.readouterr().err.split())


def test_prompts_beyond_the_positions_are_left_out_of_golden_and_greedy_answers(learned: Path, tmp_path: Path) -> None:
    values = runs.settings(learned, tmp_path, max_steps=1)
    rows = [json.dumps({"prompt": f"lamp {i}", "completion": "red"}) for i in range(6)]
    (tmp_path / "held.jsonl").write_text("\n".join([json.dumps(DIMS), *rows]))
    values["data"] |= {"validation": str(tmp_path / "held.jsonl"), "test": None}
    config = runs.write_config(tmp_path / "config.yaml", values)
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run/reference/reference.json").read_text())
    assert len(stored["greedy"]) == 6
    assert max(len(entry["ids"]) for entry in stored["contract"]) > 64
    assert all(len(entry["ids"]) < 64 for entry in stored["contract"] if "first" in entry)


@pytest.mark.slow
@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", sorted(family_models.CASES))
def test_dry_run_passes_for_every_family_that_transformers_can_load(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with environment.silence_libraries():
        base = family_models.base(name, tmp_path / "base")
    code = _dry_run(base, tmp_path, {"data": {"chat_template": "chatml"}, "export": {"types": ["f16"]}})
    said = capfd.readouterr().err
    assert code == 0 or "cannot be loaded" in said, said


def test_layers_without_a_place_in_a_gguf_adapter_are_named(base: Path, tmp_path: Path) -> None:
    config = parse_config(runs.settings(base, tmp_path))
    found = find_base(config)
    adapted = adapters.add_adapter(loading.load_empty_model(found, config), config.adapter, found.layers)
    adapters.check_lora_places(adapted, found.layers)
    without = {f"model.layers.{layer}.mlp.up_proj.weight": "it is one of several" for layer in range(2)}
    words = r"gguf-lora has no place for the change of model.layers.0.mlp.up_proj.weight \(and 1 more\): it is one of"
    with pytest.raises(ConfigError, match=words):
        adapters.check_lora_places(adapted, replace(found.layers, without_lora_place=without))


def test_experts_have_no_place_in_a_gguf_adapter(tmp_path: Path) -> None:
    with environment.silence_libraries():
        base = family_models.base("mixtral", tmp_path / "base")
    layers = Base(str(base), base, None).layers
    assert all(".experts." in name for name in layers.without_lora_place)
    assert "such as experts" in str(layers.why_not_lora("model.layers.0.mlp.experts.0.down_proj.weight"))
    assert layers.why_not_lora("model.layers.0.self_attn.q_proj.weight") is None
