"""The page in a real browser: drawn, quiet, usable by mouse, finger and keyboard, on a phone and on paper."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetune.runs.directory import RunDirectory
from tests.report.browser import CHARTS, Opened, started
from tests.report.factories import HOSTILE, VARIATIONS, Content, rendered

# Text and its background as they are shown; what is transparent is looked through.
CONTRASTS = """() => {
    const channels = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
    const light = ([r, g, b]) => {
        const linear = (c) => (c <= 10.31 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
        const [x, y, z] = [r, g, b].map(linear);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = channels(getComputedStyle(at).backgroundColor);
            if (color.length === 3 || color[3] > 0.99) return color;
        }
        return [255, 255, 255];
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const text = walker.currentNode.data.trim();
        if (!text || element.closest('script, style, noscript, .unseen, .skip')) continue;
        if (!element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const svg = element.closest('svg');
        if (svg && element.closest('[aria-label="tip"]')) continue;
        const color = channels(svg ? style.fill : style.color);
        const cell = svg && element.closest('#survival-chart') && element.closest('[aria-label="text"]');
        if (cell) continue; // on coloured cells, which are no background: asked for separately
        const [a, b] = [light(color), light(behind(svg ? svg.parentElement : element))].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), text.slice(0, 40), element.className?.baseVal ?? element.className]);
    }
    return found;
}"""
CELLS = """(names) => names.map(([ground, text]) => {
    const probe = document.body.appendChild(document.createElement('p'));
    probe.style.background = `var(${ground})`;
    probe.style.color = `var(${text})`;
    probe.textContent = 'x';
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as found:
        yield found


@pytest.fixture
def path(run: RunDirectory, content: Content, folder: Path) -> Path:
    return rendered(run, content, folder)


@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn(browser: Any, path: Path, size: str, scheme: str) -> None:
    with Opened(browser, path, size=size, scheme=scheme) as opened:
        assert {chart: opened.marks(chart) > 2 for chart in CHARTS} == dict.fromkeys(CHARTS, True)
        assert opened.js("document.querySelectorAll('#heat button.token').length") > 100
        widths = opened.js("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1], "the page scrolls sideways"
        opened.check_quiet()


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_are_drawn_and_quiet(
    browser: Any, run: RunDirectory, content: Content, folder: Path, name: str
) -> None:
    VARIATIONS[name](content)
    with Opened(browser, rendered(run, content, folder), size="phone") as opened:
        assert opened.js("document.documentElement.scrollWidth") <= 360
        for index in range(min(3, opened.js("document.querySelectorAll('#file option').length"))):
            opened.page.select_option("#file", str(index))
        opened.check_quiet()
        assert opened.marks("loss-chart") > 2


def test_the_costliest_tensors_are_drawn(browser: Any, run: RunDirectory, content: Content, folder: Path) -> None:
    VARIATIONS["all_measured"](content)
    with Opened(browser, rendered(run, content, folder)) as opened:
        assert opened.marks("located-chart") > 4
        assert "blk.*.ffn_down.weight as q4_0 costs most" in opened.page.inner_text("#located")
        assert "4,096 tokens: 0.200" in opened.page.inner_text("#ladder")
        assert "75.0" in opened.page.inner_text("#answers")
        opened.check_quiet()


def test_figures_of_the_objective_are_drawn(browser: Any, run: RunDirectory, content: Content, folder: Path) -> None:
    made = folder / "dpo"
    shutil.copytree(run.path, made, ignore=shutil.ignore_patterns("checkpoints"))
    manifest = json.loads((made / "run.json").read_text())
    manifest["config"]["objective"] = {"kind": "dpo"}
    (made / "run.json").write_text(json.dumps(manifest))
    lines = [{"step": step, "loss": 1 / step, "reward_margin": step - 5.0, "kl": -0.1 * step} for step in range(1, 9)]
    evaluated = [{"step": step, "eval_loss": 0.5, "eval_reward_margin": 1.0, "eval_kl": -0.3} for step in (4, 8)]
    (made / "logs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *evaluated]))
    with Opened(browser, rendered(RunDirectory(made), content, folder)) as opened:
        assert opened.marks("figure-chart-0") > 2
        assert opened.marks("figure-chart-1") > 2
        text = opened.page.inner_text("#training")
        assert "Reward margin, reward of the chosen answer less that of the rejected one" in text
        assert "Loss, nats per token" not in text
        opened.check_quiet()


def test_markup_in_the_data_is_text(browser: Any, run: RunDirectory, content: Content, folder: Path) -> None:
    VARIATIONS["hostile"](content)
    with Opened(browser, rendered(run, content, folder)) as opened:
        assert opened.js("window.broken") is None
        assert opened.js("document.querySelectorAll('img').length") == 0
        assert opened.js("document.scripts.length") == 3
        shown = opened.page.inner_text("#answers dd >> nth=0")
        assert shown.split() == HOSTILE.split()
        assert "</script><script>window.broken" in opened.page.inner_text("#heat button.token >> nth=0")
        opened.check_quiet()


def test_the_policy_stops_what_would_be_injected(browser: Any, path: Path) -> None:
    """Even if something got through the escaping: no script that is not ours runs, and nothing is loaded."""
    path.write_text(
        path.read_text(encoding="utf-8").replace(
            "</body>",
            "<script>window.broken = 1</script><img src='http://127.0.0.1:9/x' onerror='window.broken = 1'></body>",
        ),
        encoding="utf-8",
    )
    with Opened(browser, path) as opened:
        assert opened.js("window.broken") is None
        assert len([line for line in opened.said if "Content Security Policy" in line]) >= 2


def test_the_ladder_shows_the_chosen_figure(browser: Any, path: Path) -> None:
    with Opened(browser, path) as opened:
        before = opened.page.inner_html("#ladder-chart")
        opened.page.click("#ladder-metrics button:has-text('Recovery')")
        assert opened.page.inner_html("#ladder-chart") != before
        assert "Recovery" in opened.page.inner_text("#ladder-chart")
        pressed = opened.js(
            "[...document.querySelectorAll('#ladder-metrics [aria-pressed=true]')].map((b) => b.textContent)"
        )
        assert pressed == ["Recovery"]
        opened.check_quiet()


def test_choosing_a_file_changes_what_is_below(browser: Any, path: Path) -> None:
    with Opened(browser, path) as opened:
        assert "tiny-q8_0.gguf" in opened.page.inner_text("#receipt")
        before = opened.page.inner_text("#heat-rows")
        opened.page.select_option("#file", label="tiny-q4_0.gguf (fails)")
        assert "tiny-q4_0.gguf" in opened.page.inner_text("#receipt")
        assert opened.page.inner_text("#heat-rows") != before
        assert opened.js("document.querySelectorAll('tr.chosen').length") == 1
        opened.check_quiet()


def test_the_theme_follows_the_system_until_it_is_chosen(browser: Any, path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with Opened(browser, path, scheme="dark") as opened:
        dark = opened.js(ground)
        opened.page.emulate_media(color_scheme="light")
        light = opened.js(ground)
        assert light != dark
        opened.page.click("#theme")
        assert opened.js(ground) == dark
        opened.page.reload()
        assert opened.js(ground) == dark, "the choice is kept"
        opened.page.click("#theme")
        assert opened.js(ground) == light
        opened.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, path: Path, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for all text, in both colour schemes, also on the cells of the heat maps."""
    with Opened(browser, path, scheme=scheme) as opened:
        opened.js("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        opened.js(CELLS, [[f"--s{n}", f"--on-s{n}"] for n in range(5)])
        opened.js(CELLS, [[f"--k{n}", "--on-k4" if n == 4 else "--on-k"] for n in range(5)])
        found = opened.js(CONTRASTS)
    assert len(found) > 300
    assert [entry for entry in found if entry[0] < 4.5] == []


def test_a_token_is_explained_by_hover_tap_and_keyboard(browser: Any, path: Path) -> None:
    for size in ("desktop", "phone"):
        with Opened(browser, path, size=size) as opened:
            panel = opened.page.locator(".row").first.locator(".panel")
            tokens = opened.page.locator(".row").first.locator("button.token")
            worst = panel.inner_text()
            assert "Trained model" in worst, "the worst token is explained before anything is touched"
            (tokens.nth(3).tap if size == "phone" else tokens.nth(3).hover)()
            assert panel.inner_text() != worst
            assert tokens.nth(3).get_attribute("aria-pressed") == "true"
            tokens.nth(3).focus()
            opened.page.keyboard.press("ArrowRight")
            assert tokens.nth(4).get_attribute("aria-pressed") == "true"
            opened.page.keyboard.press("End")
            assert opened.js("document.activeElement.matches('.row:first-child button.token:last-of-type')")
            opened.check_quiet()


def test_a_row_is_one_stop_of_the_tab_key(browser: Any, path: Path) -> None:
    with Opened(browser, path) as opened:
        stops = opened.js(
            "[...document.querySelectorAll('.strip')].map((row) => row.querySelectorAll('[tabindex=\"0\"]').length)"
        )
        assert set(stops) == {1}


def test_what_is_read_aloud(browser: Any, path: Path) -> None:
    with Opened(browser, path) as opened:
        levels = opened.js("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1
        assert all(deeper <= level + 1 for level, deeper in itertools.pairwise(levels))
        assert opened.js("document.documentElement.lang") == "en"
        nameless = """[...document.querySelectorAll('button, select, [role=img], [role=region], [role=group]')]
            .filter((each) => !each.textContent.trim() && !each.getAttribute('aria-label')).length"""
        assert opened.js(nameless) == 0
        ids = opened.js("[...document.querySelectorAll('[id]')].map((each) => each.id)")
        assert len(ids) == len(set(ids))
        dangling = """[...document.querySelectorAll('[aria-labelledby]')]
            .filter((each) => !document.getElementById(each.getAttribute('aria-labelledby'))).length"""
        assert opened.js(dangling) == 0


def test_right_to_left_rows_run_from_right_to_left(
    browser: Any, run: RunDirectory, content: Content, folder: Path
) -> None:
    VARIATIONS["strange_tokens"](content)
    with Opened(browser, rendered(run, content, folder), size="phone") as opened:
        assert opened.page.locator(".strip").first.get_attribute("dir") == "rtl"
        shown = opened.page.locator("#heat-rows").inner_text()
        for text in ("مرحبا", "U+202E", "U+200D", "↵", "⇥", "␣␣", "∅", "👍🏽"):
            assert text in shown


def test_print_is_light_and_opens_every_table(browser: Any, path: Path) -> None:
    """Light whatever the screen is, charts no wider than the paper, tables opened, nothing to press."""
    with Opened(browser, path, scheme="dark") as opened:
        document = opened.page.pdf(format="A4", print_background=True, prefer_css_page_size=True)
        assert document.startswith(b"%PDF")
        assert 3 < len(re.findall(rb"/Type\s*/Page\b", document)) < 20
        opened.page.emulate_media(media="print")
        opened.js("() => dispatchEvent(new Event('beforeprint'))")
        assert opened.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert opened.js("document.querySelectorAll('details:not([open])').length") == 0
        assert (
            opened.js("Math.max(...[...document.querySelectorAll('.chart svg')].map((s) => s.width.baseVal.value))")
            <= 680
        )
        assert not opened.page.is_visible("#theme")
        opened.js("() => dispatchEvent(new Event('afterprint'))")
        assert opened.js("document.querySelectorAll('details[open]').length") == 0
        opened.check_quiet()


def test_a_narrower_window_draws_again(browser: Any, path: Path) -> None:
    width = "document.querySelector('#ladder-chart svg').width.baseVal.value"
    with Opened(browser, path) as opened:
        wide = opened.js(width)
        opened.page.set_viewport_size({"width": 500, "height": 800})
        opened.page.wait_for_function(f"{width} < 500")
        assert wide > 900
        opened.check_quiet()
