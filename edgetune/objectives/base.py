"""What every objective states: its options, as a section of the configuration, and the facts that others ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgetune.section import Section


@dataclass(frozen=True)
class ObjectiveFacts:
    """What is known of an objective without its options."""

    title: str
    """The name in tables and messages, such as "DPO"."""
    paper: str
    """arXiv number or another source."""
    trainer: str
    """The trainer of TRL."""


class Objective(Section):
    """What is learned from the rows, and its options."""

    facts: ClassVar[ObjectiveFacts]

    kind: str
    """The objective."""
