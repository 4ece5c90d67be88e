"""How much a held-out set can say."""

from __future__ import annotations

FEW_ROWS = 20
"""Tokens of one row depend on each other, so errors that take tokens as independent need many rows. Estimates that
allow for the dependence are themselves poor with fewer clusters than this (Cameron and Miller, J. Human Resources 50,
2015, put the bound between 20 and 50)."""
FEW_TOKENS = 300
"""When nothing differs in n tokens, up to 3/n of all may, at 95 % (the rule of three): 1 % at 300."""


def caution(rows: int, tokens: int) -> str | None:
    """What the figures of so many held-out rows and scored tokens cannot say, in a sentence; None for enough."""
    doubts = []
    if tokens < FEW_TOKENS:
        unseen = min(1.0, 3 / max(1, tokens))
        doubts.append(f"a difference in {unseen:.{0 if unseen > 0.1 else 1}%} of all tokens can go unseen")
    if rows < FEW_ROWS:
        doubts.append("standard errors, which take the tokens of a row as independent, are too small")
    if not doubts:
        return None
    count = f"{rows} held-out row{'' if rows == 1 else 's'} with {tokens} scored token{'' if tokens == 1 else 's'}"
    return f"{count} {'is' if rows == 1 else 'are'} a small sample: {', and '.join(doubts)}"
