"""The receipt, the contract and the training of a file as (name, value) lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from edgetune.report.gather import FileReport
from edgetune.runs.manifest import RunManifest, TrainResults
from edgetune.validation.numbers import number, share, short, size

CHECKS = {
    "template": "the chat template is that of the training",
    "rendering": "conversations render to the same text",
    "BOS": "texts start with the same number of BOS tokens",
    "tokens": "texts have the same token ids",
    "stop": "generation stops at the same tokens",
}
_MERGE_BASES = {
    "original": "the base as it is stored (original)",
    "nf4": "the base quantized to 4 bits, as in training (nf4)",
}


@dataclass(frozen=True)
class ContractCheck:
    """One respect of the contract."""

    what: str
    words: str
    detail: str
    """The first difference; empty if there is none."""


def contract_checks(file: FileReport) -> list[ContractCheck]:
    """Return the checks of the contract; [] if it was not checked."""
    if file.rung.contract is None:
        return []
    found = {each.what: each.detail for each in file.rung.contract.differences}
    words = CHECKS | {what: what for what in found if what not in CHECKS}
    return [ContractCheck(what, text, found.get(what, "")) for what, text in words.items()]


def file_facts(file: FileReport) -> list[tuple[str, str]]:
    """Return what the file is and how it was made."""
    receipt = file.receipt
    facts: list[tuple[str, Any]] = [("size", size(file.size))]
    if receipt is not None:
        merge_base = _MERGE_BASES.get(receipt.merge_base, receipt.merge_base)
        fallback = f"{share(receipt.fallback_share)} of the bytes" if receipt.fallback_share else None
        facts += [
            ("recipe", receipt.recipe),
            ("bits per weight", receipt.bits_per_weight),
            ("architecture", receipt.architecture),
            ("merged into", merge_base),
            (
                "mean KLD of each merge base",
                ", ".join(f"{k} {short(v)}" for k, v in (receipt.merge_base_kld or {}).items()),
            ),
            ("storage types", _types(receipt.types)),
            ("overrides", ", ".join(receipt.overrides)),
            ("importance matrix", (receipt.imatrix or {}).get("file")),
            ("fallback types", fallback),
            ("versions", ", ".join(f"{name} {version}" for name, version in receipt.versions.items())),
            ("notes", " ".join(receipt.notes)),
        ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _types(types: Mapping[str, int]) -> str:
    total = sum(types.values()) or 1
    largest = sorted(types.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {share(count / total)}" for name, count in largest)


def hashes(file: FileReport) -> Iterator[tuple[str, str]]:
    """Yield (file, SHA-256) of the inputs and the outputs of the export."""
    if file.receipt is None:
        return
    for part, files in (("base", file.receipt.base), ("adapter", file.receipt.adapter or {})):
        yield from ((f"{part}: {name}", digest) for name, digest in files.items())
    yield from (file.receipt.files or {file.name: file.receipt.sha256}).items()


def run_facts(manifest: RunManifest) -> list[tuple[str, str]]:
    """Return how the model was trained."""
    config, train = manifest.config, manifest.stages.train or TrainResults()
    adapter, training = config.get("adapter") or {}, config.get("training") or {}
    quantization = config.get("quantization") or {}
    kind = "rsLoRA" if adapter.get("use_rslora") else str(adapter.get("kind", "LoRA")).replace("lora", "LoRA")
    kind_of_objective = (config.get("objective") or {}).get("kind", "sft")
    losses = [f"{value:.4g}" for value in (train.loss_first, train.loss_last) if number(value) is not None]
    facts: list[tuple[str, Any]] = [
        ("base", _base_name(manifest.base.name)),
        ("adapter", f"{kind}, r {adapter.get('r')}, alpha {number(adapter.get('alpha')) or 0:g}" if adapter else None),
        ("trained by", None if manifest.adopted is None else manifest.adopted.trainer),
        ("objective", None if kind_of_objective == "sft" else kind_of_objective),
        ("base in training", f"{quantization.get('type')}, 4 bits" if quantization.get("bits") == 4 else None),
        ("data", _data(manifest.data)),
        ("steps", train.steps or None),
        ("batch", training.get("batch_size")),
        ("learning rate", f"{short(training.get('learning_rate'))}, {training.get('scheduler')}" if training else None),
        ("optimizer", training.get("optimizer")),
        ("loss", " → ".join(losses)),
        ("held-out loss", None if number(train.eval_loss) is None else f"{train.eval_loss:.4g}"),
        *((f"held-out {name.replace('_', ' ')}", short(value)) for name, value in train.metrics.items()),
        ("device", manifest.device.get("name") or manifest.device.get("type")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _base_name(name: str | None) -> str:
    """Return owner/name of the hub as it is; only the last part of a path of this machine."""
    text = name or ""
    return text if text.count("/") == 1 and not text.startswith((".", "/", "~")) else PurePath(text).name


def _data(data: Mapping[str, Any]) -> str:
    parts = ((part, files) for part, files in data.items() if isinstance(files, list))
    counted = (
        (part, sum(int(file.get("rows") or 0) for file in files if isinstance(file, Mapping))) for part, files in parts
    )
    return ", ".join(f"{rows:,} {part}" for part, rows in counted if rows)
