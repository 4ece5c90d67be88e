"""The conclusion of each chart in a sentence or two, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.report.gather import FileReport, ReportData
from edgetune.report.survival import TensorSurvival
from edgetune.validation.numbers import number, plural, share, short, size
from edgetune.validation.results import TRAINED, Rung, ScoreFigures

_INTACT, _LOST = 0.95, 0.5


Scored = tuple[str, str | None, ScoreFigures]
"""Name of a model, the state of its file (None for the trained model), and its scores."""


def scored(data: ReportData) -> list[Scored]:
    """Return the scores of a reward model and its files; [] for a language model."""
    trained = data.rung(TRAINED)
    rows: list[Scored] = [] if trained is None or trained.scores is None else [(TRAINED, None, trained.scores)]
    return [*rows, *((file.short, file.state, file.rung.scores) for file in data.files if file.rung.scores)]


def scores(file: FileReport) -> str:
    """Return how the scores of a file differ from those of the trained model."""
    found = file.rung.scores
    if found is None:
        return ""
    flipped = round(found.flips * found.pairs) if number(found.flips) is not None else 0
    order = f"{plural(flipped, 'pair has', 'pairs have')} another order" if flipped else "every pair has the same order"
    part = number(found.mean_difference / found.trained_spread) if found.trained_spread else None
    relative = f", {share(part)} of the spread of the trained scores" if part is not None else ""
    return (
        f"Of {plural(found.pairs, 'held-out pair')}, {file.short} ranks {share(found.accuracy)} as labelled, the "
        f"trained model {share(found.trained_accuracy)}; {order}. A score differs by {short(found.mean_difference)} "
        f"on average{relative}."
    )


def ladder(data: ReportData, chosen: FileReport) -> str:
    """Return how much of the training gain survives, the stage that adds most divergence, and what the figures mean."""
    said = (sentence[0].upper() + sentence[1:] for sentence in chosen.rung.meaning)
    gain = [] if chosen.rung.scores else [_gain(data, chosen)]
    return " ".join([*gain, *(f"{sentence}." for sentence in said)])


def _gain(data: ReportData, chosen: FileReport) -> str:
    base, trained = data.rung("base"), data.rung("trained")
    recovery = number(chosen.rung.figures.recovery)
    losses = [number(rung.figures.cross_entropy.value) if rung else None for rung in (base, trained, chosen.rung)]
    if None in losses or recovery is None:
        return "Training gained nothing on the held-out rows, so there is no gain that an export could keep or lose."
    before, after, exported = (short(value) for value in losses)
    lost = chosen.rung.lost
    added = number(lost.kld) if lost else None
    stage = (
        f" The stage that adds most divergence: {lost.stage} ({short(added)} nats per token)." if lost and added else ""
    )
    return (
        f"Training lowered the loss on the held-out rows from {before} to {after} nats per token. The loss of "
        f"{chosen.short} is {exported}: {share(recovery, 2)} of the gain survives the export.{stage}"
    )


def long_rows(rung: Rung) -> str:
    """Return the divergence at long contexts."""
    rows = [f"{row.tokens:,.0f} tokens: {short(row.kld)}" for row in rung.long_rows]
    return f"Mean KL divergence of long rows, in nats per token: {'; '.join(rows)}." if rows else ""


def tensor_costs(rung: Rung) -> str:
    """Return which kind of tensor costs most, and what to do about it."""
    costs = rung.located
    total = number(costs.kld) if costs else None
    if costs is None or not costs.kinds or not total:
        return ""
    worst = costs.kinds[0]
    gain = number(worst.gain) or 0.0
    if gain <= 0:
        return "The divergence is not lower with any kind of tensor in 16 bits: the storage types are not the cause."
    slot = worst.tensor.removeprefix("blk.*.").removesuffix(".weight")
    return (
        f"{worst.tensor} as {worst.type} costs most: in 16 bits the mean KLD would be {share(gain / total, 0)} lower. "
        f"To store only these tensors in a finer type: --tensor-type '{slot}=q8_0'."
    )


def is_on_front(file: FileReport, files: Sequence[FileReport]) -> bool:
    """Whether no other file is at least as small and at least as close, and better in one of the two."""
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
    """Return which files are worth their bytes."""
    front = [file for file in files if is_on_front(file, files)]
    behind = [file.short for file in files if file not in front and file.size is not None and file.kld is not None]
    passing = [file for file in files if file.state == "pass" and file.size is not None]
    parts = []
    if passing:
        smallest = min(passing, key=lambda file: file.size or 0)
        parts.append(f"{smallest.short} is the smallest file that meets every threshold ({size(smallest.size)}).")
    elif any(file.state == "unjudged" for file in files):
        parts.append("No threshold is set that could choose a file: see gate: in the configuration.")
    elif any(file.state == "none" for file in files):
        parts.append("No file passes the gate: thresholds that are set were not measured.")
    else:
        parts.append("No file passes the gate: export a finer storage type, or train longer.")
    if behind:
        verb = "is" if len(behind) == 1 else "are"
        parts.append(f"{_listed(behind)} {verb} not worth the bytes: another file is smaller and at least as close.")
    return " ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def spread(file: FileReport) -> str:
    """Return whether the mean is representative of the tokens."""
    figures = file.rung.figures
    median, late = (figures.kld_percentiles.get(key) for key in ("50", "99"))
    text = (
        f"Half of the tokens have a divergence below {short(median)} nats, one in a hundred above {short(late)}; "
        f"the largest is {short(figures.kld_max)}."
    )
    worst = number(file.rung.detail.worst_percent_share) if file.rung.detail else None
    if worst is None:
        return text
    end = ": look at the rows below." if worst > _LOST else "."
    return f"{text} The worst hundredth of the tokens accounts for {share(worst, 0)} of all divergence{end}"


def tokens(file: FileReport) -> str:
    """Return how often the most likely token differs."""
    same, count = number(file.rung.figures.same_top.value), file.rung.figures.tokens
    if same is None or not count:
        return ""
    other = round((1 - same) * count)
    if other == 0:
        return f"At each of the {count:,.0f} tokens the file and the trained model have the same top token."
    return (
        f"At {other:,} of {count:,.0f} tokens ({share(1 - same)}) the file and the trained model have different top "
        "tokens. There a greedy answer would take another course."
    )


def survival(found: Sequence[TensorSurvival]) -> str:
    """Return whether the trained change survives in the tensors."""
    if not found:
        return ""
    lost = sorted((tensor for tensor in found if tensor.ratio < _INTACT), key=lambda tensor: tensor.ratio)
    if not lost:
        return f"All {len(found)} changed tensors keep at least 95\u00a0% of their change. Nothing to do."
    worst = lost[0]
    slots = list(dict.fromkeys(tensor.slot for tensor in lost))[:2]
    advice = " ".join(f"--tensor-type '{slot}=q6_k'" for slot in slots)
    grave = " More than half of its change is lost." if worst.ratio < _LOST else ""
    return (
        f"{len(lost)} of {len(found)} changed tensors keep less than 95 % of their change; the weakest is "
        f"{worst.name} with {worst.ratio:.2f}.{grave} If the figures above are too low, store these tensors in a finer "
        f"type: {advice}."
    )


def task(rung: Rung, trained: Rung | None) -> str:
    """Return how many answers are correct, compared with the trained model."""
    score = rung.task
    if score is None or not score.rows:
        return ""
    text = f"{score.right:,.0f} of {score.rows:,.0f} answers are correct"
    if trained is not None and trained.task is not None:
        change = score.right - trained.task.right
        more = f"{abs(change):,.0f} {'more' if change > 0 else 'fewer'} than before the export"
        text += f", {more if change else 'as many as before the export'}"
    same = score.same_as_trained
    text += "." if same is None else f"; {same:,.0f} equal the trained model's, character for character."
    if rung.agreement is not None:
        text += f" On average the first {share(rung.agreement.mean)} of the tokens of an answer agree."
    return text
