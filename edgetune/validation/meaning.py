"""What the figures of a file mean, in one sentence for each kind of outcome that is easily taken for a fault.

A run that is trained in 4 bits has a trained model whose base is rounded. A file on the original base is another model:
it may predict the rows better than the trained model, and choose other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgetune.validation.numbers import share, short, with_error
from edgetune.validation.results import BASE, TRAINED, HiddenRows, Mean, Rung
from edgetune_converters.names import NF4, ORIGINAL

ABOVE_ONE = 1.05
"""A recovery up to this is called complete."""
LOW_SAME_TOP = 0.95
"""A share of equal most likely tokens below this is explained."""
LARGE_SHARE = 0.5
"""Share of a divergence from which one cause is called the main one."""
CERTAIN = 2.0
"""Standard errors from which a training gain is certain."""


@dataclass(frozen=True)
class Outcome:
    """A file, and what it is compared with."""

    file: Rung
    rungs: Sequence[Rung]
    trained_in_4_bits: bool

    def of_kind(self, kind: str) -> Rung:
        """Return the base or the trained model."""
        return next(rung for rung in self.rungs if rung.kind == kind)

    def merged(self, merge_base: str) -> Rung | None:
        """Return the measured model on a merge base that says most about it: a merged one, else the largest file."""
        found = [rung for rung in self.rungs if rung.merge_base == merge_base and rung is not self.file]
        return max(found, key=lambda rung: (rung.file is None, rung.size or 0), default=None)

    @property
    def gain(self) -> Mean:
        """The training gain in cross-entropy, in nats per token."""
        return self.of_kind(BASE).figures.log_perplexity_ratio

    @property
    def on_another_base(self) -> bool:
        """Whether the file holds the base unrounded, and training saw it in 4 bits."""
        return self.trained_in_4_bits and self.file.merge_base == ORIGINAL

    @property
    def recovery(self) -> float:
        """The recovery, NaN where it is not defined."""
        found = self.file.figures.recovery
        return float("nan") if found is None else found


def explain(file: Rung, rungs: Sequence[Rung], *, trained_in_4_bits: bool) -> list[str]:
    """Return what the figures of a file mean, where that is not plain: at most one sentence on each subject.

    Args:
        file: The rung of the file.
        rungs: All rungs of the ladder.
        trained_in_4_bits: Whether training saw the base in 4 bits.
    """
    outcome = Outcome(file, rungs, trained_in_4_bits)
    found = []
    for subject in _MEANINGS:
        found += [sentence(outcome) for applies, sentence in subject if applies(outcome)][:1]
    return found


def describe_hidden(hidden: HiddenRows, *, plain: bool) -> str:
    """Return what the rows of a soft prompt take of the probability, for the page or in plain characters."""
    mean, largest = (short(value, 2, plain=plain) for value in (hidden.mean, hidden.largest))
    return (
        f"the {hidden.rows} rows that the soft prompt adds to the vocabulary take a share of {mean} of the "
        f"probability on average, {largest} at most; the figures leave them out, as edgetune does when it runs the "
        f"file, and with them the mean KLD is {short(hidden.divergence, 2, plain=plain)} higher"
    )


# -- what a file on the original base is -------------------------------------------------------------------------------


def _differs(outcome: Outcome) -> bool:
    figures = outcome.file.figures
    return outcome.on_another_base and (outcome.recovery > ABOVE_ONE or figures.same_top.value < LOW_SAME_TOP)


def _other_base(outcome: Outcome) -> str:
    return (
        f"training saw the base in 4 bits and this file holds the original one, so it {_deviations(outcome)}; "
        f"that is another model rather than a loss of quantization, and {_alternative(outcome)}"
    )


def _deviations(outcome: Outcome) -> str:
    figures, trained = outcome.file.figures, outcome.of_kind(TRAINED).figures
    said = []
    if outcome.recovery > ABOVE_ONE:
        said.append(
            f"predicts these rows better than the trained model (perplexity {_number(figures.perplexity)} against "
            f"{_number(trained.perplexity)}, recovery {outcome.recovery:.2f})"
        )
    if figures.same_top.value < LOW_SAME_TOP:
        others = share(1 - figures.same_top.value, plain=True)
        said.append(f"has another most likely token at {others} of the positions")
    return " and ".join(said)


def _mostly_base(outcome: Outcome) -> bool:
    """Whether most of a divergence is there before quantization, because of the merge base."""
    merged, figures = outcome.merged(ORIGINAL), outcome.file.figures
    if not outcome.on_another_base or merged is None or merged.file or not outcome.file.is_quantized:
        return False
    return merged.figures.kld.value >= LARGE_SHARE * figures.kld.value > outcome.of_kind(TRAINED).figures.kld.value


def _base_share(outcome: Outcome) -> str:
    merged = outcome.merged(ORIGINAL)
    assert merged is not None
    return (
        f"of its mean KLD of {_number(outcome.file.figures.kld)}, {_number(merged.figures.kld)} come from the merge "
        f"base and not from the storage type: training saw the base in 4 bits; {_alternative(outcome)}"
    )


def _alternative(outcome: Outcome) -> str:
    """What another merge base gives: measured where it is in the ladder."""
    other = outcome.merged(NF4)
    if other is None:
        return (
            "--merge-base nf4 follows the trained model, --merge-base auto measures both "
            "(edgetune reference RUN --merged nf4 shows by how much)"
        )
    figures = other.figures
    same = share(figures.same_top.value, plain=True)
    return (
        f"--merge-base nf4 follows the trained model (measured as {other.name}: mean KLD {_number(figures.kld)}, same "
        f"top {same}, perplexity {_number(figures.perplexity)})"
    )


# -- what a recovery means ---------------------------------------------------------------------------------------------


def _is_scorer(outcome: Outcome) -> str:
    return (
        "it is a reward model, which is not trained to predict these rows: recovery, perplexity and task say nothing "
        "of it; judge the file by its scores, and by mean KLD"
    )


def _no_gain(outcome: Outcome) -> str:
    before, after = (_number(outcome.of_kind(kind).figures.cross_entropy) for kind in (BASE, TRAINED))
    return (
        f"training gained nothing on these rows (cross-entropy {before} before, {after} after it), so there is no gain "
        "to recover: judge the file by mean KLD and same top"
    )


def _uncertain_gain(outcome: Outcome) -> str:
    return (
        f"the training gain on these rows is {with_error(outcome.gain, plain=True)} nats per token, within "
        f"{CERTAIN:.0f} standard errors: a recovery of {outcome.recovery:.2f} says little; measure on more rows"
    )


def _worse_than_base(outcome: Outcome) -> str:
    lost = outcome.file.lost
    where = f" (most is lost in the stage {lost.stage})" if lost else ""
    return (
        f"it predicts these rows worse than the base before training (recovery {outcome.recovery:.2f}){where}: "
        "take a storage type of more bits, or another merge base"
    )


def _above_one(outcome: Outcome) -> str:
    return (
        f"a recovery of {outcome.recovery:.2f} means that the errors of quantization happen to favor these rows, "
        f"beside a training gain of {with_error(outcome.gain, plain=True)} nats per token: no improvement to count on"
    )


def _number(value: Mean) -> str:
    return short(value.value, 3, plain=True)


_Case = tuple[Callable[[Outcome], bool], Callable[[Outcome], str]]
# subject -> its cases, of which the first that applies is said
_MEANINGS: tuple[tuple[_Case, ...], ...] = (
    ((_differs, _other_base), (_mostly_base, _base_share)),
    (
        (lambda outcome: outcome.of_kind(TRAINED).scores is not None, _is_scorer),
        (lambda outcome: outcome.of_kind(TRAINED).figures.recovery is None, _no_gain),
        (lambda outcome: outcome.gain.value < CERTAIN * outcome.gain.error, _uncertain_gain),
        (lambda outcome: outcome.recovery < 0, _worse_than_base),
        (lambda outcome: outcome.recovery > ABOVE_ONE and not outcome.on_another_base, _above_one),
    ),
)
