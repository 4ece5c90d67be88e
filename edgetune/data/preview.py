"""Rows as the model sees them, with the tokens that are trained on highlighted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

from rich.text import Text

from edgetune.data.dataset import EncodedSplit
from edgetune.data.fitting import KeyUsage
from edgetune.data.masks import EncodedRow
from edgetune.data.problems import SHOWN_PROBLEMS, RowProblems
from edgetune.data.text_tokenizer import TextTokenizer

TRAINED = "bold green"
GIVEN = "dim"


def segments(row: EncodedRow, tokenizer: TextTokenizer) -> Iterator[tuple[bool, str]]:
    """Yield (trained on, text) of each stretch of tokens; texts are differences of decoded prefixes, so they join."""
    done, text = 0, ""
    for trained, run in groupby(row.supervised):
        done += len(list(run))
        upto = tokenizer.decode(row.input_ids[:done])
        yield trained, upto[len(text) :]
        text = upto


def highlight_row(row: EncodedRow, tokenizer: TextTokenizer, *, color: bool) -> Text:
    """Return a row as text; without color, what is trained on stands in ⟦brackets⟧."""
    result = Text()
    for trained, text in segments(row, tokenizer):
        mark = trained and not color
        result.append(f"⟦{text}⟧" if mark else text, style=TRAINED if trained else GIVEN)
    return result


def count_rows(count: int, kind: str = "") -> str:
    """Return `1 row` or `2 rows`, with the kind of the rows before the noun."""
    return f"{count} {kind + ' ' if kind else ''}row{'' if count == 1 else 's'}"


def preview_rows(encoding: EncodedSplit, tokenizer: TextTokenizer, count: int, *, color: bool) -> Iterator[Text]:
    """Yield headings and texts of the first rows, as the objective reads them: both answers of a pair, the label of an
    answer, the columns of a prompt."""
    for number, (heading, *rows) in enumerate(islice(_items(encoding), count), 1):
        for name, row in rows:
            yield Text(f"{heading} {number}{name}: {_describe_length(row)}", style="bold")
            yield highlight_row(row, tokenizer, color=color)
        yield Text()


def _items(encoding: EncodedSplit) -> Iterator[tuple[str, *tuple[tuple[str, EncodedRow], ...]]]:
    """Yield what is trained on, with the noun of each and its rows: (what is said behind the number, row)."""
    if encoding.pairs:
        for pair in encoding.pairs:
            yield "pair", (", chosen", pair.chosen.row), (", rejected", pair.rejected.row)
    elif encoding.labelled:
        for labelled in encoding.labelled:
            yield "answer", (f", {'desirable' if labelled.label else 'undesirable'}", labelled.answer.row)
    elif encoding.prompts:
        for prompt in encoding.prompts:
            columns = ", ".join(f"{key}={value!r}" for key, value in prompt.columns.items())
            ids = prompt.prompt_ids
            yield "prompt", (f" ({columns})" if columns else "", EncodedRow(ids, [False] * len(ids)))
    else:
        for row in encoding.rows:
            yield "block" if encoding.texts else "row", ("", row)


def _describe_length(row: EncodedRow) -> str:
    length, trained = len(row.input_ids), sum(row.supervised)
    return f"{length} tokens, {trained} trained on ({trained / max(1, length):.0%})"


def format_objective(encoding: EncodedSplit) -> str:
    """Return the number of pairs, labels, prompts or documents; "" for conversations."""
    if encoding.pairs:
        return f"{len(encoding.pairs)} pair{'' if len(encoding.pairs) == 1 else 's'}, of whose chosen answers: "
    if encoding.labelled:
        good = encoding.labelled.desirable
        return f"{len(encoding.labelled)} labelled answers, {good} of them desirable, of which: "
    if encoding.prompts:
        names = dict.fromkeys(key for prompt in encoding.prompts for key in prompt.columns)
        given = f" with {', '.join(names)} for the reward functions" if names else ""
        return f"{len(encoding.prompts)} prompt{'' if len(encoding.prompts) == 1 else 's'}{given}; for the reference: "
    if encoding.texts:
        return f"{encoding.texts} document{'' if encoding.texts == 1 else 's'} packed into blocks: "
    return ""


def format_totals(encoding: EncodedSplit) -> str:
    """Return the counts of all rows on one line."""
    share = encoding.supervised / max(1, encoding.tokens)
    parts = [
        f"{format_objective(encoding)}{count_rows(len(encoding.rows))}, {encoding.tokens} tokens, "
        f"{share:.1%} trained on, longest {encoding.longest}",
        f"{encoding.truncated} cut at max_length" if encoding.truncated else "",
        f"{encoding.dropped} dropped, with nothing {'to tell the answers apart' if encoding.pairs else 'to train on'}"
        if encoding.dropped
        else "",
        f"{encoding.split} split into one row for each turn" if encoding.split else "",
        f"{encoding.untrained_turns} assistant turns not trained on, by their flags"
        if encoding.untrained_turns
        else "",
    ]
    return "; ".join(part for part in parts if part)


def format_split(encoding: EncodedSplit) -> list[str]:
    """Return lines about rows that differ from the rendered conversation: split ones, and completed thoughts."""
    lines = []
    if encoding.split_reason:
        count = f"{encoding.split} conversation{'s' if encoding.split > 1 else ''}"
        lines.append(f"in {count} each assistant turn is a separate row, because {encoding.split_reason}")
    if encoding.completed:
        answers = f"{encoding.completed} answer{'s begin' if encoding.completed > 1 else ' begins'}"
        lines.append(
            f"{answers} with the end of a thought: the prompt of the chat template opens one, which its rendering of "
            "answers leaves out"
        )
    return lines


def format_blank(encoding: EncodedSplit) -> list[str]:
    """Return the line about answers without text; [] if there are none."""
    if not encoding.blank:
        return []
    example = f"; for example {encoding.blank_example}" if encoding.blank_example else ""
    several = encoding.blank > 1
    return [
        f"{encoding.blank} answer{'s hold' if several else ' holds'} no text (empty, or white space only), so the "
        f"model learns to say nothing there{example}"
    ]


def one_sided_labels(encoding: EncodedSplit) -> list[str]:
    """Return the warning about labelled answers that are all desirable, or all undesirable; [] for others."""
    count, good = len(encoding.labelled), encoding.labelled.desirable if encoding.labelled else 0
    if not count or 0 < good < count:
        return []
    kind, other = ("desirable", "undesirable") if good else ("undesirable", "desirable")
    return [f"all {count} answers that are trained on are {kind}: KTO learns from both kinds; give {other} ones too"]


def format_unused(usage: KeyUsage) -> list[str]:
    """Return the block that names the keys of rows that training does not see; [] if there are none."""
    lines = usage.describe()
    return ["keys that are not used:", *(f"  {line}" for line in lines)] if lines else []


def format_skipped(problems: RowProblems) -> list[str]:
    """Return the number of rows that are left out, and the kinds of their problems; [] if there are none."""
    if not problems.count:
        return []
    shown = problems.describe()
    left_out = f"{count_rows(problems.count)} {'is' if problems.count == 1 else 'are'} left out"
    return [f"{left_out} (data.on_bad_row: skip):", *shown[:SHOWN_PROBLEMS]]


def format_moment(rendered_at: str) -> str:
    """Return the note about a template that prints the day or the time."""
    return (
        "the chat template prints the day or the time: all rows are rendered as of "
        f"{rendered_at.replace('T', ' ')}, and the run and its files keep that; `edgetune run` uses the real time"
    )
