"""What each chart says, in a sentence or two: the conclusion, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.report.gather import FileReport, Json, ReportData
from edgetune.report.numbers import entry, number, share, short, size
from edgetune.report.survival import TensorSurvival

_WHOLE, _LOST = 0.95, 0.5


def ladder(material: ReportData, chosen: FileReport) -> str:
    """Where on the way the loss appears."""
    rungs = (material.rung("base"), material.rung("trained"), chosen.rung)
    entropy = [number(entry(rung, "figures", "cross_entropy", "value")) for rung in rungs]
    recovery = number(entry(chosen.rung, "figures", "recovery"))
    if None in entropy or recovery is None:
        return "Training gained nothing on the held-out rows, so there is nothing that an export could keep or lose."
    base, trained, arrived = (short(value) for value in entropy)
    lost, added = entry(chosen.rung, "lost", "stage"), number(entry(chosen.rung, "lost", "kld"))
    blame = f" The step that adds most divergence: {lost} ({short(added)} nats per token)." if lost and added else ""
    return (
        f"Training took the loss on held-out rows from {base} to {trained} nats per token. {chosen.short} stands at "
        f"{arrived}: {share(recovery, 2)} of that gain has arrived.{blame}"
    )


def long_rows(rung: Json) -> str:
    """Rows that are there for their length: whether positions far out are right."""
    rows = [(number(row.get("tokens")), number(row.get("kld"))) for row in rung.get("long_rows") or []]
    known = [f"{tokens:,.0f} tokens: {short(kld)}" for tokens, kld in rows if tokens is not None]
    return f"Long rows, mean KLD in nats: {'; '.join(known)}." if known else ""


def located(rung: Json) -> str:
    """Which kind of tensor costs most, and what to do about it."""
    kinds = entry(rung, "located", "kinds") or []
    whole = number(entry(rung, "located", "kld"))
    if not kinds or not whole:
        return ""
    tensor, gain = str(kinds[0]["tensor"]), number(kinds[0]["gain"]) or 0.0
    if gain <= 0:
        return "No kind of tensor lowers the divergence when it is swapped back to 16 bits: the type is not what costs."
    slot = tensor.removeprefix("blk.*.").removesuffix(".weight")
    return (
        f"{tensor} as {kinds[0]['type']} costs most: in 16 bits the divergence would fall by {share(gain / whole, 0)}. "
        f"A finer type for it alone: --tensor-type '{slot}=q8_0'."
    )


def is_on_front(file: FileReport, files: Sequence[FileReport]) -> bool:
    """Whether no other file is both smaller (or as small) and closer (or as close)."""
    if file.size is None or file.kld is None:
        return False
    return not any(
        other is not file
        and other.size is not None
        and other.kld is not None
        and other.size <= file.size
        and other.kld <= file.kld
        and (other.size, other.kld) != (file.size, file.kld)
        for other in files
    )


def sizes(files: Sequence[FileReport]) -> str:
    """Which files are worth their bytes."""
    front = [file for file in files if is_on_front(file, files)]
    behind = [file.short for file in files if file not in front and file.size is not None and file.kld is not None]
    passing = [file for file in files if not file.misses and file.size is not None]
    parts = []
    if passing:
        smallest = min(passing, key=lambda file: file.size or 0)
        parts.append(f"{smallest.short} is the smallest file that passes ({size(smallest.size)}).")
    else:
        parts.append("No file passes: export a finer type, or train longer.")
    if behind:
        verb = "is" if len(behind) == 1 else "are"
        parts.append(f"{_listed(behind)} {verb} not worth the bytes: another file is smaller and no farther away.")
    return " ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def spread(file: FileReport) -> str:
    """Whether the mean stands for the tokens."""
    percentiles = entry(file.rung, "figures", "kld_percentiles") or {}
    median, late, most = (number(percentiles.get(key)) for key in ("50", "99", "none"))
    most = number(entry(file.rung, "figures", "kld_max"))
    text = (
        f"Half of the tokens differ by less than {short(median)} nats, one in a hundred by more than {short(late)}; "
        f"the worst by {short(most)}."
    )
    held = number(entry(file.rung, "detail", "worst_percent_share"))
    if held is not None:
        text += f" The worst hundredth of the tokens holds {share(held, 0)} of all divergence"
        text += ": look at those below." if held > _LOST else "."
    return text


def tokens(file: FileReport) -> str:
    """How often the first choice is another."""
    same, count = (number(entry(file.rung, "figures", *path)) for path in (("same_top", "value"), ("tokens",)))
    if same is None or count is None:
        return ""
    other = round((1 - same) * count)
    if other == 0:
        return f"At each of the {count:,.0f} tokens the file's top token is the trained model's."
    return (
        f"At {other:,} of {count:,.0f} tokens ({share(1 - same)}) the file's top token is another than the trained "
        "model's. These are the places where a greedy answer takes another turn."
    )


def survival(found: Sequence[TensorSurvival]) -> str:
    """Whether what was trained is still in the tensors."""
    if not found:
        return ""
    lost = sorted((tensor for tensor in found if tensor.ratio < _WHOLE), key=lambda tensor: tensor.ratio)
    if not lost:
        return f"All {len(found)} changed tensors carry at least 95\u00a0% of their change. Nothing to do."
    worst = lost[0]
    slots = list(dict.fromkeys(tensor.slot for tensor in lost))[:2]
    advice = " ".join(f"--tensor-type '{slot}=q6_k'" for slot in slots)
    grave = " More than half of its change is gone." if worst.ratio < _LOST else ""
    return (
        f"{len(lost)} of {len(found)} changed tensors carry less than 95 % of their change; the weakest is "
        f"{worst.name} with {worst.ratio:.2f}.{grave} If the figures above are too low, give these a finer type: "
        f"{advice}."
    )


def task(rung: Json, trained: Json) -> str:
    """The answers, against the trained model's."""
    stored, before = rung.get("task") or {}, trained.get("task") or {}
    rows, right = (number(stored.get(key)) for key in ("rows", "right"))
    if rows is None or right is None:
        return ""
    text = f"{right:,.0f} of {rows:,.0f} answers are right"
    had = number(before.get("right"))
    if had is not None:
        change = right - had
        text += (
            f", {abs(change):,.0f} {'more' if change > 0 else 'fewer'} than before export"
            if change
            else ", as before export"
        )
    same = number(stored.get("same_as_trained"))
    text += "." if same is None else f"; {same:,.0f} are the trained model's to the letter."
    agreement = number(entry(rung, "agreement", "mean"))
    if agreement is not None:
        text += f" Token by token, {share(agreement)} of each answer is the trained model's before the two part."
    return text
