"""Runs and validations to make reports of: what `validate` wrote of a tiny model, and variations of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.commands.report import FILE
from edgetune.report import gather, page
from edgetune.runs.directory import RunDirectory

Content = dict[str, Any]
HOSTILE = (
    "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'> <!-- \u2028 & \"' ${1} {{ 1 }}"
)
STRANGE = [
    "مرحبا",
    " بالعالم",
    "שלום",
    "👩‍👩‍👧",
    "👍🏽",
    "\u202e",
    "\u200d",
    "\u200b",
    "\n",
    "\t",
    "  ",
    "",
    "⟨F0 9F⟩",
    "\x00",
    "ب" * 200,
]


def rung(content: Content, name: str) -> Content:
    found: Content = next(each for each in content["rungs"] if each["name"] == name)
    return found


def files_of(content: Content) -> list[Content]:
    return [each for each in content["rungs"] if each["file"]]


def rendered(run: RunDirectory, content: Content, folder: Path) -> Path:
    """The page of one validation, which is read from a file as a user's is."""
    path = folder / "made.validation.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    page.write_page(folder / FILE, gather.gather(run, [path]))
    return folder / FILE


def one_file(content: Content) -> None:
    content["rungs"] = [each for each in content["rungs"] if not each["file"]] + files_of(content)[:1]


def no_task(content: Content) -> None:
    for each in content["rungs"]:
        each["task"] = None


def no_detail(content: Content) -> None:
    """As a version of edgetune wrote it that kept no single tokens."""
    for each in content["rungs"]:
        each.pop("detail", None)


def all_fail(content: Content) -> None:
    content["passed"] = False
    content["gate"]["recovery_min"] = 2.0
    content["misses"] = [
        {"rung": each["name"], "figure": figure, "stage": stage, "sentence": sentence}
        for each in files_of(content)
        for figure, stage, sentence in (
            ("recovery_min", "quantize", "recovery is 0.9, below the limit of 2 (recovery_min)"),
            ("contract", "tokenizer", "contract: BOS: training starts 'x' with 1 BOS, the file with 0"),
        )
    ]
    for each in files_of(content):
        each["contract"]["differences"] = [{"what": "BOS", "detail": "training starts 'x' with 1 BOS, the file with 0"}]


def nothing_gained(content: Content) -> None:
    """Training that changed nothing, a top-k reference, a single token: figures that are not defined."""
    content["reference"] |= {"kld_is_lower_bound": True, "rows": 1, "tokens": 1}
    for each in content["rungs"]:
        each["figures"] |= {"recovery": None, "kld": {"value": None, "error": None}, "kld_max": None}
        each["figures"]["kld_percentiles"] = dict.fromkeys(each["figures"]["kld_percentiles"])


def a_perfect_file(content: Content) -> None:
    """Divergences of exactly 0, which no logarithmic scale has."""
    for each in files_of(content):
        each["figures"] |= {"kld": {"value": 0.0, "error": 0.0}, "kld_max": 0.0}
        each["figures"]["kld_percentiles"] = dict.fromkeys(each["figures"]["kld_percentiles"], 0.0)


def strange_tokens(content: Content) -> None:
    """Right-to-left text, emoji, marks without a shape, bytes, and tokens as long as a line."""
    for each in files_of(content):
        for row in each["detail"]["worst_rows"]:
            count = len(row["texts"])
            row["texts"] = [STRANGE[place % len(STRANGE)] for place in range(count)]
            for sides in row["candidates"].values():
                for side in sides.values():
                    for place, pair in enumerate(side):
                        pair[0] = STRANGE[place % len(STRANGE)]


def many_files(content: Content) -> None:
    """A dozen files with names that fill a line."""
    first = files_of(content)[0]
    stored = [each for each in content["rungs"] if not each["file"]]
    made = []
    for index in range(12):
        each = copy.deepcopy(first)
        each["name"] = each["file"] = f"a-model-with-a-rather-long-name-of-its-own-{index}-q{index}_k_m_of_many.gguf"
        each["size"] = 1_000_000_000 + 37_000_000 * index**2
        each["figures"]["kld"] = {"value": 0.5 / (1 + index), "error": 0.01}
        made.append(each)
    content["rungs"] = stored + made


def all_measured(content: Content) -> None:
    """What is measured only on request, or of runs that have it."""
    for each in files_of(content):
        swaps = [
            {"tensor": f"blk.*.{slot}.weight", "type": "q4_0", "weights": 10, "kld_without": 0.1, "gain": gain}
            for slot, gain in (("ffn_down", 0.2), ("attn_v", 0.05), ("attn_q", -0.01))
        ]
        layers = [{**swaps[0], "tensor": "blk.1.ffn_down.weight", "gain": 0.15}]
        each["located"] = {"kld": 0.4, "kinds": swaps, "layers": layers, "complete": True}
        each["lost"] = {"stage": "quantize", "kld": 0.3, "hint": "Export a finer type."}
        each["agreement"] = {"rows": 3, "mean": 0.75, "whole": 2}
        each["long_rows"] = [{"tokens": 4096, "kld": 0.2, "same_top": 0.9}]
        each["hidden"] = {"rows": 20, "mean": 0.0002, "largest": 0.031, "divergence": 0.00021}


def captured_rungs(content: Content) -> None:
    """Merged models that were captured too, and a miss that says what to do next by itself."""
    merged = copy.deepcopy(content["rungs"][1]) | {"name": "merged w16", "kind": "merged", "merge_base": "w16"}
    content["rungs"].insert(2, merged)
    content["misses"] = [
        {"rung": files_of(content)[0]["name"], "figure": "origin", "stage": "origin",
         "sentence": "made from another base", "hint": "Look where it came from.", "value": None, "limit": None}
    ]  # fmt: skip


def hostile(content: Content) -> None:
    """Markup and script wherever text can be."""
    content["created"] = content["edgetune"] = HOSTILE
    for each in files_of(content):
        for row in each["detail"]["worst_rows"]:
            row["texts"] = [HOSTILE for _ in row["texts"]]
            for sides in row["candidates"].values():
                sides["trained"] = sides["file"] = [[HOSTILE, 0.5]]
        each["task"]["first_miss"] = {"prompt": HOSTILE, "expected": HOSTILE, "got": HOSTILE}
        each["contract"]["differences"] = [{"what": HOSTILE, "detail": HOSTILE}]
        each["notes"] = each["mismatches"] = [HOSTILE]
        each["name"] = each["file"] = HOSTILE.replace("/", "∕") + each["name"]
    content["misses"] = [
        {
            "rung": files_of(content)[0]["name"],
            "figure": HOSTILE,
            "stage": HOSTILE,
            "sentence": HOSTILE,
            "hint": HOSTILE,
        }
    ]


VARIATIONS: dict[str, Callable[[Content], None]] = {
    function.__name__: function
    for function in (
        one_file, no_task, no_detail, all_fail, nothing_gained, a_perfect_file, strange_tokens, many_files,
        captured_rungs, all_measured, hostile,
    )
}  # fmt: skip
