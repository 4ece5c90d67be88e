"""A Hugging Face model card (README.md) for exported files: what they are, how they were made and what was measured.

Everything is read from receipts, from the manifest of the run and from the results of `edgetune validate`. What is
unknown is left out. The card holds no path of this machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import edgetune
from edgetune.errors import RunDirectoryError
from edgetune.evaluation.results import TRAINED, EvaluationResults, find_evaluations
from edgetune.evaluation.table import describe_settings, has_differences, score_rows, signed
from edgetune.objectives import SCORERS
from edgetune.runs.manifest import RunManifest
from edgetune.validation.numbers import share, short, with_error
from edgetune.validation.results import Mean, Rung, ValidationResults, results_path
from edgetune_converters.files import atomic
from edgetune_converters.provenance.receipts import Receipt, receipt_path

FILE = "README.md"
_MARK = "<!-- made by edgetune: a new export replaces this file -->"
_LIBRARY = {"gguf": "gguf", "safetensors": "transformers", "gguf-lora": "gguf", "onnx": "onnx"}
_RELATION = {"gguf": "quantized", "safetensors": "finetune", "gguf-lora": "adapter", "onnx": "quantized"}
_RUN = {
    "gguf": 'edgetune run {file} -p "..."\nllama-cli -m {file}',
    "safetensors": 'transformers chat ./{file}   # or AutoModelForCausalLM.from_pretrained("./{file}")',
    "gguf-lora": "llama-cli -m BASE.gguf --lora {file}",
    "onnx": 'edgetune run {file} -p "..."',
}
_SCORE = {
    "gguf": "python -c 'import edgetune; print(edgetune.load(\"{file}\").reward_scores([[...]]))'",
    "safetensors": '# AutoModelForSequenceClassification.from_pretrained("./{file}")',
    "onnx": "python -c 'import edgetune; print(edgetune.load(\"{file}\").reward_scores([[...]]))'",
}
"""Of a reward model, in place of _RUN; the rows are token ids."""
_TOLD = ("the prefix of ", "the chat template begins with the soft tokens")
"""Beginnings of the notes of a receipt that say what other programs lack."""
_TRAINING = (
    "epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "scheduler", "optimizer", "seed",
)  # fmt: skip
# table of measurements: (column title, key of the rung's figures)
_FIGURES = (("mean KLD", "kld"), ("same top", "same_top"), ("perplexity", "perplexity"), ("recovery", "recovery"))


def card_path(receipt: Receipt) -> Path:
    """Return the path of the card: in a model directory, or beside a file."""
    artifact = Path(receipt.artifact)
    return (artifact if receipt.format == "safetensors" else artifact.parent) / FILE


def is_generated(path: Path) -> bool:
    """Whether edgetune has written a README.md."""
    try:
        return _MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def write_cards(name: str, receipts: Sequence[Receipt], base: Path | None, manifest: RunManifest) -> list[Path]:
    """Write a card into each folder that holds an artifact, and return the paths; `manifest` is that of the run."""
    by_path: dict[Path, list[Receipt]] = {}
    for receipt in receipts:
        by_path.setdefault(card_path(receipt), []).append(receipt)
    for path, group in by_path.items():
        atomic.write_text(path, format_card(name, group, base, manifest))
    return list(by_path)


def format_card(name: str, receipts: Sequence[Receipt], base: Path | None, manifest: RunManifest) -> str:
    """Return the text of the card."""
    sections = [
        _front_matter(receipts, base, manifest),
        _MARK,
        f"# {name}",
        _introduction(receipts, base, manifest),
        _files(receipts),
        _how_to_run(receipts, manifest),
        _training(manifest),
        _measurements(receipts),
        _benchmarks(receipts),
        _receipts(receipts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# -- the head ----------------------------------------------------------------------------------------------------------


def _front_matter(receipts: Sequence[Receipt], base: Path | None, manifest: RunManifest) -> str:
    formats = [receipt.format for receipt in receipts]
    own = _base_front_matter(base)
    hub = _hub_name(base, manifest)
    adapted = receipts[0].adapter is not None
    tags = ["edgetune", *dict.fromkeys(formats), *(["lora"] if adapted else []), receipts[0].architecture]
    entries = {
        "base_model": hub,
        "base_model_relation": _RELATION[formats[0]] if hub else None,
        "license": own.get("license"),
        "license_name": own.get("license_name"),
        "license_link": own.get("license_link"),
        "language": own.get("language"),
        "library_name": _LIBRARY[formats[0]],
        "pipeline_tag": "text-classification" if _is_scorer(manifest) else "text-generation",
        "tags": tags,
    }
    known = {key: value for key, value in entries.items() if value is not None}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"


def _base_front_matter(base: Path | None) -> dict[str, Any]:
    """Return the front matter of the base's own card; {} without one."""
    if base is None:
        return {}
    try:
        head, _, rest = (base / FILE).read_text(encoding="utf-8").partition("---\n")
        stated = yaml.safe_load(rest.partition("\n---")[0]) if not head.strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _hub_name(base: Path | None, manifest: RunManifest) -> str | None:
    """Return OWNER/NAME on the hub: from the manifest, from config.json, or from a folder of the hub's cache."""
    stated = manifest.base.name
    base = base or Path()
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    cached = [part.removeprefix("models--").replace("--", "/") for part in base.parts if part.startswith("models--")]
    for name in (stated, config.get("_name_or_path"), *cached):
        if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return name
    return None


def _introduction(receipts: Sequence[Receipt], base: Path | None, manifest: RunManifest) -> str:
    hub = _hub_name(base, manifest)
    shown = f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{base.resolve().name}`" if base else "its base"
    change = "with a LoRA adapter merged in" if receipts[0].adapter is not None else "as it is"
    if {receipt.format for receipt in receipts} == {"gguf-lora"}:
        change = "has to be there beside it: this is the adapter alone"
    return f"Made by edgetune {edgetune.__version__} from {shown}, {change}."


# -- what is there -----------------------------------------------------------------------------------------------------


def _files(receipts: Sequence[Receipt]) -> str:
    rows = [
        (f"`{Path(receipt.artifact).name}`", receipt.format, receipt.recipe, f"{receipt.size / 1e6:,.1f} MB",
         f"{receipt.bits_per_weight:.2f}")
        for receipt in receipts
    ]  # fmt: skip
    return "## Files\n\n" + _table(("file", "format", "type", "size", "bits per weight"), rows)


def _is_scorer(manifest: RunManifest) -> bool:
    return (manifest.config.get("objective") or {}).get("kind") in SCORERS


def _how_to_run(receipts: Sequence[Receipt], manifest: RunManifest) -> str:
    lines = _RUN | (_SCORE if _is_scorer(manifest) else {})
    commands = [lines[receipt.format].format(file=Path(receipt.artifact).name) for receipt in receipts]
    notes = dict.fromkeys(note for receipt in receipts for note in receipt.notes if note.startswith(_TOLD))
    told = "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in notes)
    return "## How to run it\n\n```\n" + "\n".join(commands) + "\n```" + told


def _training(manifest: RunManifest) -> str:
    rows = [(name, str(value)) for name, value in _training_facts(manifest) if value not in (None, "", {}, [])]
    return "## How it was trained\n\n" + _table(("", ""), rows) if rows else ""


def _training_facts(manifest: RunManifest) -> Iterator[tuple[str, Any]]:
    config, train = manifest.config, manifest.stages.train
    adapter, training = config.get("adapter", {}), config.get("training", {})
    yield "trained by", None if manifest.adopted is None else manifest.adopted.trainer
    if adapter:
        scale = "rsLoRA" if adapter.get("use_rslora") else "LoRA"
        yield "adapter", f"{scale}, r {adapter.get('r')}, alpha {adapter.get('alpha')}"
    quantization = config.get("quantization", {})
    if quantization.get("bits") == 4:
        yield "base while training", f"{quantization.get('type')}, 4 bits"
    if manifest.template_options:
        yield "options of the chat template", f"`{json.dumps(manifest.template_options)}`"
    for part in ("train", "validation", "test"):
        files = manifest.data.get(part, [])
        yield f"{part} rows", ", ".join(f"{file.get('rows')} of {_source_name(file)}" for file in files)
    for name in _TRAINING:
        yield name.replace("_", " "), training.get(name)
    for name in ("steps", "loss_first", "loss_last", "eval_loss"):
        value = getattr(train, name) if train else None
        known = value is not None and not math.isnan(value)
        yield name.replace("_", " "), (f"{value:.4f}" if isinstance(value, float) else value) if known else None
    yield "device", manifest.device.get("name") or manifest.device.get("type")
    yield "versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def _source_name(source: Mapping[str, Any]) -> str:
    """Return the name of a dataset of a hub, or the last part of a path."""
    return str(source.get("dataset") or Path(str(source.get("path"))).name)


def _measurements(receipts: Sequence[Receipt]) -> str:
    """Tabulate the validation results beside the files; empty if there are none."""
    rungs: dict[str, Rung] = {}
    for receipt in receipts:
        results = _results(Path(receipt.artifact))
        for rung in results.rungs if results else []:
            rungs.setdefault(rung.name, rung)
    if not rungs:
        return ""
    rows = [(f"`{name}`", *(_figure(rung, key) for _, key in _FIGURES)) for name, rung in rungs.items()]
    text = "Against the model as it was trained, on held-out rows (KLD in nats per token):"
    table = _table(("", *(title for title, _ in _FIGURES)), rows)
    return "\n\n".join(["## What was measured", *_reward_scores(rungs), text, table])


def _reward_scores(rungs: Mapping[str, Rung]) -> list[str]:
    """Return the scores of a reward model as a table with its heading; [] for a language model."""
    scored = {name: rung.scores for name, rung in rungs.items() if rung.scores}
    if not scored:
        return []
    pairs = max(scores.pairs for scores in scored.values())
    rows = [
        (f"`{name}`", share(scores.accuracy, plain=True), share(scores.flips, plain=True),
         short(scores.mean_difference, plain=True), short(scores.max_difference, plain=True),
         short(scores.correlation, 5, plain=True))
        for name, scores in scored.items()
    ]  # fmt: skip
    titles = ("", "pair accuracy", "pairs in another order", "mean difference", "largest difference", "correlation")
    return [f"Scores of both answers of {pairs} held-out pairs, beside those of the model as it was trained:",
            _table(titles, rows)]  # fmt: skip


def _benchmarks(receipts: Sequence[Receipt]) -> str:
    """Tabulate the evaluations in the run of each artifact; empty if there are none."""
    parts = [
        text
        for receipt in receipts
        for results in find_evaluations(Path(receipt.artifact))
        for text in (describe_settings(results) + ":", _scores(results, Path(receipt.artifact).name))
    ]
    return "\n\n".join(["## Benchmarks", *parts]) if parts else ""


def _scores(results: EvaluationResults, name: str) -> str:
    """Tabulate the scores of one file, beside those of the trained model if it was evaluated."""
    shown = [model for model in (TRAINED, name) if model in results.models]
    places = [results.models.index(model) for model in shown]
    compared = has_differences(results)
    place = results.files.index(name)
    rows = []
    for row in score_rows(results):
        difference = row.differences[place]
        cells = [with_error(row.scores[index], plain=True) for index in places]
        cells += [signed(difference, plain=True) if difference else ""] if compared else []
        rows.append((row.task, f"{row.metric} {row.direction}".rstrip(), str(row.documents), *cells))
    titles = [f"`{model}`" if model == name else model for model in shown]
    return _table(("task", "metric", "n", *titles, *(["difference"] if compared else [])), rows)


def _results(artifact: Path) -> ValidationResults | None:
    """Read the validation results of an artifact; None if they are missing, damaged, or of an earlier file."""
    path = results_path(artifact)
    if not path.is_file() or path.stat().st_mtime < artifact.stat().st_mtime:
        return None
    try:
        return ValidationResults.read(path)
    except RunDirectoryError:
        return None


def _figure(rung: Rung, key: str) -> str:
    value = getattr(rung.figures, key)
    value = value.value if isinstance(value, Mean) else value
    if value is None or math.isnan(value):
        return ""
    return f"{value:.1%}" if key == "same_top" else f"{value:.4g}"


def _receipts(receipts: Sequence[Receipt]) -> str:
    """Return the hashes, and the names of the receipts."""
    first = receipts[0]
    rows = [(f"base `{name}`", f"`{digest}`") for name, digest in first.base.items()]
    rows += [(f"adapter `{name}`", f"`{digest}`") for name, digest in (first.adapter or {}).items()]
    for receipt in receipts:
        files = receipt.files or {Path(receipt.artifact).name: receipt.sha256}
        rows += [(f"`{name}`", f"`{digest}`") for name, digest in files.items()]
    where = ", ".join(f"`{receipt_path(Path(receipt.artifact)).name}`" for receipt in receipts)
    text = f"SHA-256 of what went in and what came out; type of every tensor and versions are in {where}."
    return f"## Receipt\n\n{text}\n\n" + _table(("file", "SHA-256"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
