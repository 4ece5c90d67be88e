"""Clients that vanish or read slowly, signals, a second instance, files that are replaced, memory that is short."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgetune.serving.loaded_files import size_of
from tests.cli_runner import COMMAND, edgetune_process
from tests.serving.conftest import Running, is_free, running
from tests.serving.test_access import wait_until_idle

ASK = {"messages": [{"role": "user", "content": "dim the lights"}]}
LONG = {**ASK, "max_tokens": 230, "stream": True, "temperature": 0}


@contextmanager
def process(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server in a process of its own."""
    command = [*COMMAND, "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as started:
        assert started.stderr is not None
        try:
            line = started.stderr.readline().decode()
            assert "serving" in line, line
            yield started, line.split()[-1]
        finally:
            started.kill()


def open_stream(port: int, body: dict[str, Any], buffer: int = 0) -> socket.socket:
    raw = socket.socket()
    if buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.connect(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    raw.sendall(head.encode() + content)
    return raw


def test_a_client_that_vanishes_frees_its_slot(endless: Path) -> None:
    with running(endless, slots=2) as server:
        for body in (LONG, LONG | {"stream": False}, LONG | {"n": 4}):
            for _ in range(6):
                with closing(open_stream(server.port, body)) as raw:
                    if body["stream"]:
                        assert raw.recv(200)
            wait_until_idle(server)
        assert server.server.metrics.disconnects
        reply = httpx.post(server.v1 + "/chat/completions", json={**ASK, "max_tokens": 2}, timeout=60)
        assert reply.status_code == 200


def test_a_client_that_reads_nothing_is_given_up_and_does_not_hold_up_others(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.serving.replies.WRITE_SECONDS", 0.5)
    with running(endless, slots=2) as server:
        body = LONG | {"n": 16, "logprobs": True, "top_logprobs": 20}
        with closing(open_stream(server.port, body, buffer=4096)):
            reply = httpx.post(server.v1 + "/chat/completions", json={**ASK, "max_tokens": 2}, timeout=60)
            assert reply.status_code == 200
            for _ in range(600):
                if server.server.metrics.disconnects:
                    break
                time.sleep(0.05)
            assert server.server.metrics.disconnects == 1
            wait_until_idle(server)


def test_sigterm_lets_a_stream_end_and_the_server_exits_normally(endless: Path) -> None:
    with process(endless) as (server, url):
        with httpx.stream("POST", url + "/v1/chat/completions", json=LONG, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert '"finish_reason":"length"' in rest[-4]
        assert server.wait(20) == 0


def test_the_server_goes_on_where_nobody_reads_its_messages(endless: Path, tmp_path: Path) -> None:
    served = tmp_path / "lamp.gguf"
    shutil.copy(endless, served)
    with process(served) as (server, url):
        assert server.stderr is not None
        server.stderr.close()
        assert httpx.post(url + "/v1/chat/completions", json={**ASK, "max_tokens": 1}, timeout=60).status_code == 200
        shutil.copy(endless, tmp_path / "next")
        (tmp_path / "next").replace(served)
        assert httpx.post(url + "/v1/chat/completions", json={**ASK, "max_tokens": 1}, timeout=60).status_code == 200
        with httpx.stream("POST", url + "/v1/chat/completions", json=LONG, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert server.wait(20) == 0


def test_after_the_deadline_a_stream_is_cut_with_an_error(endless: Path) -> None:
    with process(endless, "--shutdown-timeout", "0", "--slots", "1") as (server, url):
        httpx.post(url + "/v1/completions", json={"prompt": "dim", "max_tokens": 1}, timeout=60)
        with httpx.stream("POST", url + "/v1/chat/completions", json={**LONG, "n": 32}, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert b"Traceback" not in server.stderr.read()
    assert "the server is shutting down" in text
    assert text.rstrip().endswith("data: [DONE]")


def test_a_second_instance_on_the_port_says_so(file: Path, live: Running) -> None:
    result = edgetune_process("serve", file, "--port", str(live.port))
    assert result.returncode == 1
    assert f"127.0.0.1:{live.port} cannot be listened on: Address already in use" in result.stderr.decode()
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "192.0.2.1", "--api-key", "x"], "cannot be listened on"),
        (["--max-memory", "1K"], "--max-memory permits"),
        (["--max-memory", "lots"], "is not a size"),
        (["other=nowhere.gguf"], "there is no file"),
    ],
)
def test_wrong_options_are_refused(file: Path, arguments: list[str], message: str) -> None:
    result = edgetune_process("serve", file, "--port", "0", *arguments)
    assert result.returncode in (1, 2)
    assert message in " ".join(result.stderr.decode().split())


def test_two_files_of_one_name_are_refused_unless_they_are_named(file: Path, tmp_path: Path) -> None:
    other = tmp_path / file.name
    shutil.copy(file, other)
    result = edgetune_process("serve", file, other)
    assert "would both be called tiny" in result.stderr.decode()
    with running(file, f"second={other}") as server:
        names = [each["id"] for each in httpx.get(server.v1 + "/models").json()["data"]]
    assert names == ["tiny", "second"]


def ask(server: Running, **more: Any) -> httpx.Response:
    body = {**ASK, "max_tokens": 3, "temperature": 0, **more}
    return httpx.post(server.v1 + "/chat/completions", json=body, timeout=60)


def test_a_replaced_file_is_loaded_again_and_running_answers_end_on_the_old_one(
    file: Path, endless: Path, tmp_path: Path
) -> None:
    served = tmp_path / "lamp.gguf"
    shutil.copy(endless, served)
    with running(served) as server:
        before = ask(server).json()
        with closing(open_stream(server.port, LONG)) as raw:
            raw.recv(200)
            shutil.copy(file, tmp_path / "next")
            (tmp_path / "next").replace(served)
            after = ask(server).json()
            raw.settimeout(20)
            text = b""
            while b"[DONE]" not in text:
                text += raw.recv(65536)
        assert b'"finish_reason":"length"' in text
        assert after["system_fingerprint"] != before["system_fingerprint"]
        assert server.server.pool.loads == 2
        wait_until_idle(server)


def test_a_file_replaced_by_a_damaged_one_is_still_served(file: Path, tmp_path: Path) -> None:
    served = tmp_path / "lamp.gguf"
    shutil.copy(file, served)
    with running(served) as server:
        before = ask(server).json()["choices"]
        (tmp_path / "next").write_bytes(b"GGUF" + bytes(100))
        (tmp_path / "next").replace(served)
        assert ask(server).json()["choices"] == before
        served.unlink()
        assert ask(server).json()["choices"] == before


def test_a_damaged_file_is_an_error_of_its_requests_alone(file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with running(file, bad) as server:
        assert ask(server, model="bad").status_code == 503
        assert ask(server, model="tiny").status_code == 200


def test_files_are_loaded_on_demand_within_the_memory_limit(file: Path, folder: Path, endless: Path) -> None:
    most = max(size_of(each) for each in (file, folder, endless)) * 3 // 2
    with running(file, folder, endless, max_memory=most) as server:
        pool = server.server.pool
        assert not pool.loaded
        for name in ("tiny", "tiny-onnx", "endless", "tiny"):
            assert ask(server, model=name).status_code == 200
            assert [model.file.name for model in pool.loaded] == [name]


def test_a_file_waits_for_the_memory_of_one_that_is_in_use(file: Path, endless: Path) -> None:
    async def both(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            names = ("endless", "tiny") * 4
            return await asyncio.gather(
                *(client.post(url, json={**ASK, "model": name, "max_tokens": 20}) for name in names)
            )

    with running(file, endless, max_memory=size_of(file) * 3 // 2) as server:
        replies = asyncio.run(both(server.v1 + "/chat/completions"))
        assert {reply.status_code for reply in replies} == {200}
        wait_until_idle(server)


def test_a_port_is_free_after_the_server_has_stopped(file: Path) -> None:
    with running(file) as server:
        assert not is_free(server.port)
    time.sleep(0.1)
    assert is_free(server.port)


def test_the_mode_is_said_in_the_reply(file: Path) -> None:
    with process(file, "--exact") as (_, url):
        reply = httpx.post(url + "/v1/chat/completions", json={**ASK, "max_tokens": 2}, timeout=60)
        assert reply.json()["system_fingerprint"].endswith("-exact")
        assert httpx.get(url + "/health").json()["mode"] == "exact"
