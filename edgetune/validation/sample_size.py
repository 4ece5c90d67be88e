"""What a held-out set of a given size can show."""

from __future__ import annotations

FEW_ROWS = 20
"""The tokens of a row are correlated, so errors that assume independent tokens need many rows. Estimates that allow
for the correlation are themselves poor with fewer clusters than this (Cameron and Miller, J. Human Resources 50, 2015:
20 to 50)."""
FEW_TOKENS = 300
"""If no difference is seen in n tokens, up to 3/n of all may differ, at 95 % (the rule of three): 1 % at 300."""


def caution(rows: int, tokens: int) -> str | None:
    """Return what a sample of this size cannot show, in a sentence; None if it is large enough."""
    doubts = []
    if tokens < FEW_TOKENS:
        unseen = min(1.0, 3 / max(1, tokens))
        doubts.append(f"a difference in {unseen:.{0 if unseen > 0.1 else 1}%} of all tokens can remain unseen")
    if rows < FEW_ROWS:
        doubts.append("the standard errors, which assume independent tokens, are too small")
    if not doubts:
        return None
    count = f"{rows} held-out row{'' if rows == 1 else 's'} with {tokens} scored token{'' if tokens == 1 else 's'}"
    return f"{count} {'is' if rows == 1 else 'are'} a small sample: {', and '.join(doubts)}"
