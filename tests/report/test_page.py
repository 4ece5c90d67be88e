"""The page as text: whole, by itself, and safe whatever the data holds. How it looks is for a browser to say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.errors import EdgetuneError, RunDirectoryError
from edgetune.report import gather, page
from edgetune.runs.directory import RunDirectory
from tests.report.factories import VARIATIONS, Content, files_of, rendered

VENDOR = Path(page.__file__).parent / "vendor"
# The files as npm has them: d3 7.9.2 dist/d3.min.js, @observablehq/plot 0.6.17 dist/plot.umd.min.js
VENDORED = {
    "d3.min.js": "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
    "d3.LICENSE": "2a6d2d5f32ba0b755ddbc1c833f766e30cdbe6ebe9a6d4e3e24427721f0b63d3",
    "plot.bundled.LICENSE": "8b768e5485fc9ced4320d660d0ddad25fb61b1dee61ce8c2fba486d2eaa642ea",
    "plot.umd.min.js": "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
    "plot.LICENSE": "4b295e011e0e046170041b5b46f1349393aeceb95797793a55bd21dbb543363a",
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)

ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    3,
    0.5,
    1e308,
    "",
    "x" * 999,
    [],
    {},
    [[]],
    [None],
    ["a"],
    [{}],
    {"a": 1},
    {"value": None},
)


class Parsed(HTMLParser):
    """Elements, and the text of scripts, as a browser's parser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    def data(self) -> Content:
        content: Content = json.loads(self.scripts[0])
        return content


def test_vendored_files_are_what_npm_has() -> None:
    assert {path.name for path in VENDOR.iterdir()} == set(VENDORED)
    for name, digest in VENDORED.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_the_page_is_one_small_file_that_loads_nothing(run: RunDirectory, content: Content, folder: Path) -> None:
    path = rendered(run, content, folder)
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1_500_000
    parsed = Parsed(text)
    loaded = [attrs[name] for _, attrs in parsed.elements for name in ("src", "href", "data") if attrs.get(name)]
    assert {each for each in loaded if each and not each.startswith("#")} == {"data:,"}
    assert not re.search(r"@import|url\((?!data:)", "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL)))
    assert str(run.path.parent) not in text


def test_the_policy_names_the_scripts_of_the_page(run: RunDirectory, content: Content, folder: Path) -> None:
    parsed = Parsed(rendered(run, content, folder).read_text(encoding="utf-8"))
    stated = next(attrs["content"] for tag, attrs in parsed.elements if attrs.get("http-equiv"))
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in parsed.scripts[1:]]
    assert stated is not None
    assert re.findall(r"'sha256-([^']+)'", stated) == digests
    assert "default-src 'none'" in stated


def test_the_page_has_what_was_measured(run: RunDirectory, content: Content, folder: Path) -> None:
    data = Parsed(rendered(run, content, folder).read_text(encoding="utf-8")).data()
    assert [file["short"] for file in data["files"]] == ["f32", "q8_0", "q4_0"]
    for file, rung in zip(data["files"], [files_of(content)[i] for i in (0, 2, 1)], strict=True):
        assert file["name"] == rung["name"]
        assert file["kld"] == rung["figures"]["kld"]["value"]
        assert file["rows"] == rung["detail"]["worst_rows"]
        assert sum(file["histogram"]["counts"]) == rung["figures"]["tokens"]
        assert len(file["survival"]) == 21  # three layers of seven
    assert [file["passed"] for file in data["files"]] == [True, True, False]
    assert data["chosen"] == 1
    assert data["curves"]["held_out"] == [[40, 0.15], [80, 0.075], [120, 0.05]]
    assert data["kld_limit"] == 0.05


def test_the_probability_of_a_soft_prompts_rows_is_on_the_page(
    run: RunDirectory, content: Content, folder: Path
) -> None:
    VARIATIONS["all_measured"](content)
    page = rendered(run, content, folder).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert (
        page.count("The 20 rows that the soft prompt adds to the vocabulary take a share of 0.00020 of the probability")
        == 3
    )


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_are_whole_pages(run: RunDirectory, content: Content, folder: Path, name: str) -> None:
    VARIATIONS[name](content)
    parsed = Parsed(rendered(run, content, folder).read_text(encoding="utf-8"))
    assert len(parsed.scripts) == 3
    assert sum(tag == "h1" for tag, _ in parsed.elements) == 1
    assert not [attrs for _, attrs in parsed.elements if any(key.startswith("on") for key in attrs)]
    assert parsed.data()["files"]


@given(JSON)
def test_embedded_json_reads_back_and_cannot_end_its_element(value: object) -> None:
    text = str(page.embedded(value))
    assert not re.search("[<>&\u2028\u2029]", text)
    assert Parsed(f'<script type="application/json">{text}</script>').scripts == [text]
    assert json.dumps(json.loads(text)) == json.dumps(_as_sent(value))


def _as_sent(value: object) -> object:
    if isinstance(value, dict):
        return {_as_sent(key): _as_sent(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_sent(each) for each in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and value - value != 0 else value


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths to everything in a JSON value."""
    inner: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value[:2]))
    return [path] * bool(path) + [place for key, each in inner for place in places(each, (*path, key))]


def test_a_file_name_that_no_file_system_takes_is_shown(run: RunDirectory, little: Path, tmp_path: Path) -> None:
    damaged = json.loads(little.read_text(encoding="utf-8"))
    damaged["rungs"][-1]["file"] = "x" * 250  # with .validation.json beyond 255
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(damaged), encoding="utf-8")
    assert page.render(gather.gather(run, [path])).rstrip().endswith("</html>")


@given(index=st.integers(0, 10**6), odd=st.none() | st.sampled_from(range(len(ODD))))
def test_a_damaged_validation_is_refused_or_shown(
    index: int, odd: int | None, run: RunDirectory, little: Path, tmp_path: Path
) -> None:
    """Anything may stand anywhere, or be missing: one sentence, or a whole page."""
    damaged = json.loads(little.read_text(encoding="utf-8"))
    every = places(damaged)
    *parents, last = every[index % len(every)]
    place = damaged
    for key in parents:
        place = place[key]
    if odd is None:
        del place[last]
    else:
        place[last] = ODD[odd]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(damaged), encoding="utf-8")
    refusal = None
    try:
        text = page.render(gather.gather(run, [path]))
    except EdgetuneError as error:
        refusal = error
    if refusal is None:
        assert text.rstrip().endswith("</html>")
    else:
        assert str(path) in refusal.message
        assert refusal.hint


@pytest.mark.parametrize("cut", [0, 1, 100, -2])
def test_a_cut_validation_is_refused(run: RunDirectory, content: Content, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(content)[:cut], encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        gather.gather(run, [path])
