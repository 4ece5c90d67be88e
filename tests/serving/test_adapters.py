"""Adapters on a served file: each is a model of its own, with the answers of the file in which it is merged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgetune.errors import ConfigError, RuntimeProblem
from edgetune.serving.loaded_files import LoadSettings, ModelPool, served_files, with_adapters
from tests.cli_runner import edgetune, sentence
from tests.converters import tiny
from tests.export_requests import export
from tests.runtime import models
from tests.serving.conftest import Running, running

PROMPTS = ("dim the lights", "lamp 7 blue?", "把卧室的灯调暗")


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, two adapters of it, and the base with each of them merged; all in f32."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {"base": models.gguf(base, folder / "base.gguf")}
    for seed, name in enumerate(("formal", "brief")):
        adapter = tiny.adapter(base, folder / name, seed=seed)
        export(base, {"f32": folder / f"{name}-merged.gguf"}, lora={"f32": folder / f"{name}.gguf"}, adapter=adapter)
        found |= {name: folder / f"{name}.gguf", f"{name}-merged": folder / f"{name}-merged.gguf"}
    return found


@pytest.fixture(scope="module")
def server(files: dict[str, Path]) -> Iterator[Running]:
    """The base with both adapters, and both merged files."""
    served = [files["base"], files["formal-merged"], files["brief-merged"]]
    with running(*served, adapters=[f"base:{files['formal']}", f"base:{files['brief']}"]) as opened:
        yield opened


def ask(server: Running, model: str, prompt: str = PROMPTS[0], **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0}
    reply = httpx.post(server.v1 + "/chat/completions", json={**body, **more}, timeout=60)
    found: dict[str, Any] = reply.json()
    return found


def text(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


@pytest.mark.parametrize("name", ["formal", "brief"])
def test_an_adapter_answers_as_the_file_in_which_it_is_merged(server: Running, name: str) -> None:
    for prompt in PROMPTS:
        found = ask(server, f"base:{name}", prompt)
        assert found["model"] == f"base:{name}"
        assert text(found) == text(ask(server, f"{name}-merged", prompt)) != text(ask(server, "base", prompt))
        assert text(ask(server, name, prompt)) == text(found)


def test_requests_of_several_adapters_at_once_have_their_own_answers(server: Running) -> None:
    names = ("base", "base:formal", "base:brief")
    expected = {(name, prompt): text(ask(server, name, prompt)) for name in names for prompt in PROMPTS}

    async def all_at_once() -> dict[tuple[str, str], str]:
        pairs = list(expected) * 3
        found = await asyncio.gather(*(asyncio.to_thread(ask, server, *pair) for pair in pairs))
        return dict(zip(pairs, map(text, found), strict=True))

    assert asyncio.run(all_at_once()) == expected


def test_all_dialects_name_adapters(server: Running) -> None:
    question = [{"role": "user", "content": PROMPTS[0]}]
    expected = text(ask(server, "base:formal"))
    claude = httpx.post(
        server.url + "/v1/messages", timeout=60,
        json={"model": "base:formal", "max_tokens": 24, "messages": question, "temperature": 0},
    ).json()  # fmt: skip
    assert "".join(block["text"] for block in claude["content"]) == expected
    ollama = httpx.post(
        server.url + "/api/chat", timeout=60,
        json={
            "model": "base:formal", "messages": question, "stream": False,
            "options": {"temperature": 0, "num_predict": 24},
        },
    ).json()  # fmt: skip
    assert (ollama["model"], ollama["message"]["content"]) == ("base:formal", expected)


def test_lists_show_adapters_with_their_base(server: Running) -> None:
    models = {each["id"]: each.get("parent") for each in httpx.get(server.v1 + "/models").json()["data"]}
    assert models == {
        "base": None, "base:formal": "base", "base:brief": "base", "formal-merged": None, "brief-merged": None,
    }  # fmt: skip
    tags = [each["name"] for each in httpx.get(server.url + "/api/tags").json()["models"]]
    assert tags == ["base:latest", "base:formal", "base:brief", "formal-merged:latest", "brief-merged:latest"]
    prints = {ask(server, name)["system_fingerprint"] for name in ("base", "base:formal", "base:brief")}
    assert len(prints) == 3


def test_log_probabilities_with_echo_are_those_of_the_adapter(server: Running) -> None:
    def score(name: str) -> list[float]:
        body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 0, "echo": True, "logprobs": 0}
        reply = httpx.post(server.v1 + "/completions", json=body, timeout=60).json()
        scores: list[float] = reply["choices"][0]["logprobs"]["token_logprobs"][1:]
        return scores

    assert score("base:formal") == pytest.approx(score("formal-merged"), abs=1e-3)
    assert score("base:formal") != pytest.approx(score("base"), abs=1e-1)


def test_lora_of_llama_server_weights_adapters_for_one_request(server: Running) -> None:
    both = [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.0}]
    assert text(ask(server, "base", lora=both)) == text(ask(server, "base:formal"))
    assert text(ask(server, "base:formal", lora=[])) == text(ask(server, "base"))
    mixed = text(ask(server, "base", lora=[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.5}]))
    assert mixed not in {text(ask(server, name)) for name in ("base", "base:formal", "base:brief")}
    for wrong, said in (
        ([{"id": 2}], "the file has 2 adapters"), ([{"id": 0}, {"id": 0}], "twice"), ([{"scale": 1}], "missing"),
        ("x", "lora"),
    ):  # fmt: skip
        error = ask(server, "base", lora=wrong)["error"]
        assert said in error["message"]
        assert error["param"].startswith("lora")


def test_embeddings_of_an_adapter_are_refused(server: Running) -> None:
    reply = httpx.post(server.v1 + "/embeddings", json={"model": "base:formal", "input": "x"}, timeout=60)
    assert reply.status_code == 400
    assert "embeddings are made without adapters" in reply.json()["error"]["message"]


def test_a_weight_applies_to_all_requests_of_the_adapter(server: Running, files: dict[str, Path]) -> None:
    with running(files["base"], adapters=[f"{files['formal']}=0.5", str(files["brief"])]) as other:
        assert text(ask(other, "base:formal")) == text(ask(server, "base", lora=[{"id": 0, "scale": 0.5}]))


def test_a_replaced_adapter_is_loaded_again(files: dict[str, Path], tmp_path: Path) -> None:
    tone = tmp_path / "tone.gguf"
    tone.write_bytes(files["formal"].read_bytes())
    with running(files["base"], adapters=[str(tone)]) as server:
        before = text(ask(server, "base:tone"))
        (tmp_path / "next").write_bytes(files["brief"].read_bytes())
        (tmp_path / "next").replace(tone)
        assert text(ask(server, "base:tone")) != before
        assert server.server.pool.loads == 2


def test_adapters_that_cannot_be_served_are_refused(files: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    other = tiny.base("llama", tmp_path / "base")
    export(other, {}, lora={"f32": tmp_path / "l.gguf"}, adapter=tiny.adapter(other, tmp_path / "adapter"))
    gguf, onnx = served_files([str(files["base"])]), served_files([str(folder)])
    two = served_files([str(files["base"]), f"other={files['formal-merged']}"])
    formal = str(files["formal"])
    for served, arguments, said in (
        (gguf, [formal, formal], "two adapters would be called base:formal"),
        (gguf, [f"{formal}=x"], "'x' is not a weight"), (gguf, [f"{formal}=nan"], "not a weight"),
        (gguf, [str(tmp_path / "l.gguf")], "is for an architecture llama"),
        (onnx, [formal], "no GGUF file is served"), (onnx, [f"{folder.name}:{formal}"], "takes no adapters"),
        (two, [formal], "could belong to base, other"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            with_adapters(served, arguments)
    for wrong in (str(files["base"]), "nowhere.gguf", f"base:{tmp_path}"):
        with pytest.raises(RuntimeProblem, match="adapter"):
            with_adapters(gguf, [wrong])
    found = with_adapters(two, [f"other:{formal}=0.5"])
    assert ModelPool(found, LoadSettings()).models["other:formal"].adapters == (("other:formal", 0.5),)


# -- run and chat ------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    result = edgetune(*arguments, "--max-tokens", "16")
    assert result.returncode == 0, result.stderr
    return result.stdout.decode()


def test_run_and_chat_answer_with_an_adapter_as_the_merged_file(files: dict[str, Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS), encoding="utf-8")
    for arguments in (("-p", PROMPTS[0]), ("--input", rows)):
        merged = run("run", files["formal-merged"], *arguments)
        assert run("run", files["base"], "--adapter", files["formal"], *arguments) == merged
        assert run("run", files["base"], *arguments) != merged
        half = run("run", files["base"], "--adapter", f"{files['formal']}=0.5", *arguments)
        assert half not in (merged, run("run", files["base"], *arguments))
    lines = b"dim the lights\n"
    chats = [
        edgetune("chat", *arguments, "--max-tokens", "16", stdin=lines).stdout
        for arguments in ((files["base"], "--adapter", files["brief"]), (files["brief-merged"],), (files["base"],))
    ]
    assert chats[0] == chats[1] != chats[2]


def test_an_output_is_not_continued_with_another_adapter(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "dim"}\n', encoding="utf-8")
    common = ("run", files["base"], "--input", rows, "--output", tmp_path / "out.jsonl", "--max-tokens", "4")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgetune.generation.answering.format_row", stop)
        assert edgetune(*common, "--adapter", files["formal"]).returncode == 130
    result = edgetune(*common, "--adapter", files["brief"])
    assert result.returncode == 2
    assert "was begun with other settings: adapters" in " ".join(sentence(result).split())
    assert edgetune(*common, "--adapter", files["formal"]).returncode == 0


def test_wrong_adapters_are_named_before_the_model_is_opened(files: dict[str, Path], tmp_path: Path) -> None:
    for wrong, said in (
        ((tmp_path / "none.gguf",), "there is no adapter"), ((files["base"],), "is not a GGUF adapter"),
        ((f"{files['formal']}=much",), "'much' is not a weight"), ((files["formal"], files["formal"]), "given twice"),
    ):  # fmt: skip
        options = [option for path in wrong for option in ("--adapter", str(path))]
        result = edgetune("run", files["base"], "-p", "x", *options)
        assert result.returncode in (1, 2)
        assert said in " ".join(sentence(result).split())
