"""The one Jinja sandbox of edgetune: what it refuses, and that there is no other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from edgetune_converters import chat_template
from edgetune_converters.errors import ChatTemplateError

ROOT = Path(__file__).parents[2]


def test_no_other_module_makes_a_jinja_environment() -> None:
    """report/page.py renders HTML, with escaping: another thing."""
    makers = {
        file.relative_to(ROOT).as_posix()
        for package in ("edgetune", "converters/edgetune_converters")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Environment")
    }
    assert makers == {"converters/edgetune_converters/chat_template.py", "edgetune/report/page.py"}


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) }}",
        "{{ [] | first + 1 }}",
        "{{ 'a' + 1 }}",
        "{{ {} | sum('x') | fromjson }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for m in messages %}" * 60 + "{% endfor %}" * 60,
    ],
)
def test_every_failure_inside_a_template_is_one_error(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        chat_template.render(template, [{"role": "user", "content": "a"}], {})
