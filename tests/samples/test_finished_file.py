"""The finished file of the sample answers, and carries the proof that it is what was trained."""

from pathlib import Path

import pytest

import edgetune
from tests.cli_runner import edgetune as run_command

FILE = Path(__file__).parents[2] / "samples/smart-home/smart-home-q4_k_m.gguf"


@pytest.mark.parametrize(
    ("sentence", "action"),
    [
        (
            "dim the bedroom lights to 30% at 7pm",
            '{"action":"set","device":"light","room":"bedroom","level":30,"time":"19:00"}',
        ),
        ("把卧室的灯调到三成亮", '{"action":"set","device":"light","room":"bedroom","level":30}'),
    ],
    ids=["English", "Chinese"],
)
def test_the_finished_file_answers_as_the_readme_says(sentence: str, action: str) -> None:
    with edgetune.load(FILE) as model:
        assert model.chat([{"role": "user", "content": sentence}], max_tokens=64).text() == action


def test_the_finished_file_verifies() -> None:
    result = run_command("verify", FILE)
    assert result.returncode == 0
    assert result.stdout.decode().count("ok ") == 7
