"""Receipt and contract of a file as (name, value) lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from edgetune.report.gather import FileReport, Json
from edgetune.report.numbers import entry, number, share, short, size

CHECKS = {
    "template": "the chat template in the file is that of training",
    "rendering": "conversations are rendered to the same text",
    "BOS": "texts start with the same number of BOS tokens",
    "tokens": "texts become the same token ids",
    "stop": "generation ends at the same tokens",
}


@dataclass(frozen=True)
class ContractLine:
    """One respect of the contract."""

    what: str
    words: str
    detail: str
    """Empty where it holds."""


def contract(file: FileReport) -> list[ContractLine]:
    """The checks of the contract with the first difference of each; [] when it was not checked."""
    stored = file.rung.get("contract")
    if not isinstance(stored, Mapping):
        return []
    found = {str(each["what"]): str(each["detail"]) for each in stored.get("differences") or []}
    words = CHECKS | {what: what for what in found if what not in CHECKS}
    return [ContractLine(what, text, found.get(what, "")) for what, text in words.items()]


def facts(file: FileReport) -> list[tuple[str, str]]:
    """What the file is and how it was made."""
    receipt = file.receipt
    stated: list[tuple[str, Any]] = [
        ("size", size(file.size)),
        ("recipe", receipt.get("recipe")),
        ("bits per weight", receipt.get("bits_per_weight")),
        ("architecture", receipt.get("architecture")),
        ("merged into", _merge_base(receipt.get("merge_base"))),
        ("mean KLD with each", _measured(receipt.get("merge_base_kld"))),
        ("stored types", _types(receipt.get("types"))),
        ("types set by hand", ", ".join(receipt.get("overrides") or [])),
        ("importance matrix", entry(receipt, "imatrix", "file")),
        ("fallback", share(receipt["fallback_share"]) + " of the bytes" if receipt.get("fallback_share") else None),
        ("made with", _versions(receipt.get("versions"))),
        ("notes", " ".join(map(str, receipt.get("notes") or []))),
    ]
    return [(name, str(value)) for name, value in stated if value not in (None, "")]


def _merge_base(value: Any) -> str | None:
    words = {
        "original": "the base as it is (original)",
        "nf4": "the base rounded to 4 bits, as it was trained on (nf4)",
    }
    return words.get(str(value), str(value)) if value else None


def _measured(kld: Any) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in (kld or {}).items())


def _types(types: Any) -> str:
    if not isinstance(types, Mapping):
        return ""
    total = sum(number(value) or 0 for value in types.values()) or 1
    largest = sorted(types.items(), key=lambda pair: -(number(pair[1]) or 0))
    return ", ".join(f"{name} {share((number(value) or 0) / total)}" for name, value in largest)


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, Mapping) else ""


def hashes(file: FileReport) -> Iterator[tuple[str, str]]:
    """(file, SHA-256) of what went in and what came out."""
    receipt = file.receipt
    for part in ("base", "adapter"):
        for name, digest in (receipt.get(part) or {}).items():
            yield f"{part}: {name}", str(digest)
    for name, digest in (receipt.get("files") or {file.name: receipt.get("sha256")}).items():
        if digest:
            yield str(name), str(digest)


def run_facts(manifest: Json) -> list[tuple[str, str]]:
    """How the model was trained."""
    config, train = manifest.get("config") or {}, entry(manifest, "stages", "train") or {}
    adapter, training = config.get("adapter") or {}, config.get("training") or {}
    kind = "rsLoRA" if adapter.get("use_rslora") else str(adapter.get("kind", "LoRA")).replace("lora", "LoRA")
    bits = entry(config, "quantization", "bits")
    loss = [number(train.get(key)) for key in ("loss_first", "loss_last", "eval_loss")]
    stated: list[tuple[str, Any]] = [
        ("base", _base_name(entry(manifest, "base", "name"))),
        ("adapter", f"{kind}, r {adapter.get('r')}, alpha {number(adapter.get('alpha')) or 0:g}" if adapter else None),
        ("base while training", f"{entry(config, 'quantization', 'type')}, 4 bits" if bits == 4 else None),
        ("data", _data(manifest.get("data"))),
        ("steps", train.get("steps")),
        ("batch", training.get("batch_size")),
        ("learning rate", f"{short(training.get('learning_rate'))}, {training.get('scheduler')}" if training else None),
        ("optimizer", training.get("optimizer")),
        ("loss", " → ".join(f"{value:.4g}" for value in loss[:2] if value is not None)),
        ("held-out loss", None if loss[2] is None else f"{loss[2]:.4g}"),
        ("device", entry(manifest, "device", "name") or entry(manifest, "device", "type")),
    ]
    return [(name, str(value)) for name, value in stated if value not in (None, "")]


def _base_name(name: Any) -> str:
    """owner/name on the hub as it is; of a path of this machine only its last part."""
    text = str(name or "")
    return text if text.count("/") == 1 and not text.startswith((".", "/", "~")) else PurePath(text).name


def _data(data: Any) -> str:
    parts = data.items() if isinstance(data, Mapping) else []
    counted = (
        (part, sum(int(file.get("rows") or 0) for file in files if isinstance(file, Mapping))) for part, files in parts
    )
    return ", ".join(f"{rows:,} {part}" for part, rows in counted if rows)
