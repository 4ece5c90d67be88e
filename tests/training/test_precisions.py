"""Every method on a base in NF4, FP4, int8 and 16 bits: a dry run takes or refuses it as docs/methods.md states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune import cli
from edgetune.config import Config, load_config
from edgetune.methods import Method
from edgetune.planning.prepare import prepare_run
from edgetune.training import adapters
from edgetune.training.loading import load_model
from tests.training import kinds, runs

TABLE = kinds.load_table()
METHODS: Mapping[str, Method] = {title: method for title, _, method in TABLE.methods()}
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "type": "nf4"},
    "fp4": {"bits": 4, "type": "fp4"},
    "int8": {"bits": 8},
    "16 bits": {"bits": 16},
}
ONLY_UNQUANTIZED = ("PiSSA", "OLoRA", "CorDA", "freeze", "full fine-tuning")
PAIRS = [(title, precision) for title in METHODS for precision in PRECISIONS]
FAST = {("LoRA", "fp4"), ("LoftQ", "nf4"), ("LLaMA Pro", "nf4"), ("BitFit", "int8"), ("prefix tuning", "int8")}


def refusal(title: str, precision: str) -> str | None:
    """Why the table says that a method is not trained on a precision; None if it is."""
    found: str | None = TABLE.refusal(METHODS[title], PRECISIONS[precision]["bits"], None)
    return found


TRAINED = [pair for pair in PAIRS if refusal(*pair) is None]
REFUSED = [pair for pair in PAIRS if refusal(*pair) is not None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The base without and with biases of the attention, which BEFT trains."""
    found = {}
    for biases in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "SHAPE", runs.SHAPE | {"attention_bias": biases})
            found[biases] = runs.make_base(tmp_path_factory.mktemp("base") / "hf", "float32")
    return found


def write_config(title: str, precision: str, folder: Path, base: Path = Path("base")) -> Path:
    """A configuration with the merge base that the method needs."""
    method = METHODS[title]
    stated = {**method.model_dump(mode="json", exclude_unset=True), **kinds.OPTIONS.get(method.kind, {})}
    stated |= {"kind": method.kind}
    stated |= {"tokens": ["<|im_start|>"]} if method.kind == "trainable-tokens" else {}
    values = runs.settings(base, folder) | {"adapter": stated, "quantization": PRECISIONS[precision]}
    values["training"]["gradient_checkpointing"] = False  # which drops the keys and values of a prefix
    # LLaMA-Adapter has no export, and LoftQ is merged into the 4-bit base alone
    values["export"] = {"formats": [], **({"merge_base": "nf4"} if title == "LoftQ" else {})}
    return runs.write_config(folder / "config.yaml", values)


def test_the_table_in_the_docs_marks_exactly_these_pairs() -> None:
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if re.search(r"\| `kind: ", line)]
    head = next(
        re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if line.startswith("| method | `adapter`")
    )
    marks = {(row[0], bits): row[head.index(f"{bits} bits")] for row in rows for bits in (4, 8, 16)}
    expected = {
        (title, PRECISIONS[precision]["bits"]): "–" if refusal(title, precision) else "yes"
        for title, precision in PAIRS
    }
    assert marks == expected


@pytest.mark.parametrize("title", ONLY_UNQUANTIZED)
def test_what_changes_the_weights_themselves_is_trained_on_16_bits_alone(title: str) -> None:
    assert [precision for precision in PRECISIONS if refusal(title, precision) is None] == ["16 bits"]


@pytest.mark.parametrize(("title", "precision"), REFUSED)
def test_a_refused_pair_is_refused_with_its_reason(
    title: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(title, precision, tmp_path)
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run"), "--dry-run"]) == 2
    expected = refusal(title, precision)
    assert expected is not None
    assert " ".join(expected.split()) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("title", "precision"), [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in TRAINED]
)
def test_every_other_pair_passes_a_dry_run_and_learns(
    title: str, precision: str, bases: dict[bool, Path], tmp_path: Path
) -> None:
    base = bases[METHODS[title].kind == "beft"]
    config = write_config(title, precision, tmp_path, base)
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run"), "--dry-run"]) == 0
    before, after = losses_of(load_config(config))
    assert after < before - 1e-4


def losses_of(config: Config) -> tuple[float, float]:
    """The loss of a row before and after some optimizer steps on it."""
    prepared = prepare_run(config)
    torch.manual_seed(0)
    model = load_model(prepared.base, config)
    rows = [row.input_ids for row in prepared.train.rows]
    sources = adapters.StartSources(
        lambda: rows,
        lambda: load_model(
            prepared.base,
            config.model_copy(update={"quantization": config.quantization.model_copy(update={"bits": 16})}),
        ),
    )
    adapted = adapters.add_adapter(model, config.adapter, prepared.base.layers, (), sources)
    adapters.cast_trainable_to_float32(adapted)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    ids = torch.tensor([rows[0]])

    def loss() -> torch.Tensor:
        found: torch.Tensor = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        return found

    adapted.eval()
    before = float(loss().detach())
    for _ in range(6):
        adapted.train()
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
        adapted.eval()  # PVeRA draws samples in training
    return before, float(loss().detach())
