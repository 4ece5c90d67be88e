"""The card of `edgetune plan`: figures with their reasons, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Unit = Literal["bytes", "seconds", "tokens/s", "count"]


@dataclass(frozen=True)
class Figure:
    """A figure, and what it follows from."""

    name: str
    value: float | None
    """None: it is not known, and the reason says why."""
    unit: Unit
    reason: str = ""

    @property
    def text(self) -> str:
        """The value with its unit, as people read it."""
        return "-" if self.value is None else _FORMATS[self.unit](self.value)


@dataclass(frozen=True)
class CardSection:
    """Figures about one thing."""

    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class PlanCard:
    """What a training and its files will take, before anything is paid."""

    sections: tuple[CardSection, ...]
    checks: tuple[str, ...] = ()
    """What was checked and holds, a sentence each."""
    proposal: dict[str, Any] = field(default_factory=dict)
    """Settings that fit the target: section -> option -> value; empty without a target."""
    proposal_reasons: tuple[str, ...] = ()

    def with_section(self, section: CardSection) -> PlanCard:
        """Return the card with a further section at its end."""
        return replace(self, sections=(*self.sections, section))

    def as_json(self) -> dict[str, Any]:
        """Return the card as plain JSON values."""
        sections = {
            section.title: {
                figure.name: {"value": figure.value, "unit": figure.unit, "reason": figure.reason}
                for figure in section.figures
            }
            for section in self.sections
        }
        card: dict[str, Any] = {"version": 1, "sections": sections, "checks": list(self.checks)}
        if self.proposal:
            card["proposal"] = {"settings": self.proposal, "reasons": list(self.proposal_reasons)}
        return card

    def lines(self) -> Iterator[str]:
        """Yield the lines of the card."""
        named = [figure for section in self.sections for figure in section.figures]
        name_width = max((len(figure.name) for figure in named), default=0)
        text_width = max((len(figure.text) for figure in named), default=0)
        for section in self.sections:
            yield section.title
            for figure in section.figures:
                yield f"  {figure.name:<{name_width}}  {figure.text:>{text_width}}  {figure.reason}".rstrip()
        if self.checks:
            yield "checked"
            yield from (f"  {check}" for check in self.checks)
        if self.proposal:
            yield "proposal"
            yield from (f"  # {reason}" for reason in self.proposal_reasons)
            for name, options in self.proposal.items():
                yield f"  {name}:"
                yield from (f"    {key}: {_yaml(value)}" for key, value in options.items())


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def format_bytes(count: float) -> str:
    """Return bytes in MiB, or in GiB from 1 on."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{max(count / 2**20, 0.1):.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = round(seconds)
    if whole < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 5400:
        return f"{whole // 60} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _format_speed(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 10 else f"{value:.1f}/s"


_FORMATS: Mapping[Unit, Callable[[float], str]] = {
    "bytes": format_bytes,
    "seconds": format_seconds,
    "tokens/s": _format_speed,
    "count": "{:,.0f}".format,
}
