"""`edgetune serve` as a process with an API key, used by the clients of others over HTTP, and by none too kindly."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

pytest.importorskip("tenacity", reason="lm_eval needs it for servers")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from tests.cli_runner import COMMAND, edgetune_process

pytestmark = pytest.mark.slow
KEY = secrets.token_urlsafe(16)
ASK: list[Any] = [{"role": "user", "content": "dim the lights"}]
REQUESTS = 2000


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, file: Path) -> None:
        self.process, self.url, self.file = process, url, file
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=120)

    @property
    def memory(self) -> float:
        """Anonymous memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"RssAnon:\s+(\d+)", status)
        assert found is not None
        return int(found.group(1)) / 1024

    @property
    def sockets(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208 - only their number counts

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.startswith(f"edgetune_{name}")]
        return sum(map(float, values))

    def wait_until_idle(self) -> None:
        """Wait until nothing is decoded but the question for it."""
        for _ in range(400):
            if not self.metric("slots_active") and self.metric("active_requests") == 1:
                return
            time.sleep(0.05)
        raise AssertionError("a request still holds a slot")


def start(file: Path, *options: str) -> Served:
    command = [*COMMAND, "serve", str(file), "--port", "0", "--threads", "1", *options]
    environment = {**os.environ, "EDGETUNE_API_KEY": KEY}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    with process.stderr:
        line = process.stderr.readline().decode()
    assert "serving" in line, line
    return Served(process, line.split()[-1], file)


@pytest.fixture(scope="module")
def served(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = tmp_path_factory.mktemp("real") / "lamp.gguf"
    shutil.copy(endless, file)
    server = start(file, "--slots", "4", "--queue", "256")
    yield server
    server.http.close()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


def test_a_wrong_key_is_refused_in_the_words_of_each_client(served: Served) -> None:
    with (
        openai.OpenAI(base_url=served.url + "/v1", api_key="no") as gpt,
        pytest.raises(openai.AuthenticationError, match="the API key is wrong"),
    ):
        gpt.models.list()
    with (
        anthropic.Anthropic(base_url=served.url, api_key="no") as claude,
        pytest.raises(anthropic.AuthenticationError, match="the API key is wrong"),
    ):
        claude.messages.create(model="lamp", max_tokens=1, messages=ASK)
    with ollama.Client(host=served.url) as local, pytest.raises(ollama.ResponseError, match="no API key"):
        local.list()


def test_the_clients_have_the_same_answer(served: Served) -> None:
    with openai.OpenAI(base_url=served.url + "/v1", api_key=KEY, max_retries=0) as gpt:
        stream = gpt.chat.completions.create(model="lamp", messages=ASK, max_tokens=12, temperature=0, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        response = gpt.responses.create(model="lamp", input="dim the lights", max_output_tokens=12, temperature=0)
        assert [model.id for model in gpt.models.list()] == ["lamp"]
    assert text == response.output_text
    with (
        anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as claude,
        claude.messages.stream(model="lamp", messages=ASK, max_tokens=12, extra_body={"temperature": 0}) as events,
    ):
        assert "".join(events.text_stream) == text
    options = {"temperature": 0, "num_predict": 12}
    with ollama.Client(host=served.url, headers={"authorization": f"Bearer {KEY}"}) as local:
        parts = list(local.chat(model="lamp", messages=ASK, options=options, stream=True))
        assert "".join(part.message.content or "" for part in parts) == text
        assert [each.model for each in local.list().models] == ["lamp:latest"]


def test_lm_eval_scores_and_generates(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    pairs = [("lamp 7 blue?", " blue"), ("把卧室的灯调暗", "好的")]
    scorer = LocalCompletionsAPI(
        base_url=served.url + "/v1/completions", model="lamp", max_length=200, auth_token=KEY,
        tokenizer_backend="remote",
    )  # fmt: skip
    found = scorer.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (prompt, answer), (total, _) in zip(pairs, found, strict=True):
        body = {"prompt": prompt + answer, "max_tokens": 0, "echo": True, "logprobs": 0}
        reply = served.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        ids = served.http.post("/tokenize", json={"content": answer}).json()["tokens"]
        assert total == pytest.approx(sum(reply["token_logprobs"][-len(ids) :]), abs=1e-3)
    chat = LocalChatCompletion(base_url=served.url + "/v1/chat/completions", model="lamp")
    until = {"until": ["QQ"], "max_gen_toks": 8, "do_sample": False}
    asked = instances("generate_until", [(chat.apply_chat_template(ASK), until)])
    body = {"messages": ASK, "max_tokens": 8, "temperature": 0, "stop": ["QQ"]}
    expected = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert chat.generate_until(asked, disable_tqdm=True) == [expected]


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("a task", number, 1))
        for number, each in enumerate(arguments)
    ]


def open_stream(served: Served, tokens: int, buffer: int = 0) -> socket.socket:
    raw = socket.socket()
    if buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    host, port = served.url.removeprefix("http://").split(":")
    raw.connect((host, int(port)))
    raw.settimeout(60)
    body = json.dumps({"messages": ASK, "max_tokens": tokens, "stream": True, "temperature": 0}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\nconnection: close\r\n"
    raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return raw


def read_all(raw: socket.socket, pause: float = 0.0, piece: int = 65536) -> bytes:
    pieces = []
    while found := raw.recv(piece):
        pieces.append(found)
        time.sleep(pause)
    return b"".join(pieces)


def test_slow_readers_and_vanished_clients_leave_nothing_behind(served: Served) -> None:
    served.wait_until_idle()
    before = served.sockets
    for _ in range(30):
        with closing(open_stream(served, 200)) as raw:
            assert raw.recv(100)
    with closing(open_stream(served, 60, buffer=2048)) as slow, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, slow, 0.02, 512)
        began = time.monotonic()
        reply = served.http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 2})
        assert reply.status_code == 200
        assert time.monotonic() - began < 20, "a slow reader does not hold up others"
        assert b"data: [DONE]" in reading.result()
    served.wait_until_idle()
    assert served.sockets <= before + 2


def test_memory_is_flat_over_many_requests(served: Served) -> None:
    bodies = [
        ("/v1/chat/completions", {"messages": ASK, "max_tokens": 3}),
        ("/v1/chat/completions", {"messages": ASK, "max_tokens": 3, "stream": True, "logprobs": True}),
        ("/v1/messages", {"model": "lamp", "messages": ASK, "max_tokens": 3}),
        ("/api/chat", {"model": "lamp", "messages": ASK, "options": {"num_predict": 3}}),
        ("/v1/completions", {"prompt": "dim the", "max_tokens": 1, "echo": True, "logprobs": 1}),
        ("/v1/responses", {"input": "dim", "max_output_tokens": 3, "stream": True}),
        ("/v1/chat/completions", {"messages": ASK, "temperature": "hot"}),
    ]  # fmt: skip

    def ask(number: int) -> int:
        path, body = bodies[number % len(bodies)]
        return served.http.post(path, json=body).status_code

    def all_of(count: int) -> list[int]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(ask, range(count)))

    all_of(REQUESTS // 4)
    before = served.memory
    codes = all_of(REQUESTS)
    served.wait_until_idle()
    assert set(codes) == {200, 400}
    assert codes.count(400) == len(range(len(bodies) - 1, REQUESTS, len(bodies)))
    assert served.memory < before + 8, "MB"


def test_a_second_instance_on_the_port_says_so_and_the_first_goes_on(served: Served) -> None:
    result = edgetune_process("serve", served.file, "--port", served.url.rpartition(":")[2])
    assert result.returncode == 1
    assert b"cannot be listened on" in result.stderr
    assert served.http.get("/health").status_code == 200


def test_a_file_replaced_in_mid_stream_serves_the_next_request(served: Served, file: Path, tmp_path: Path) -> None:
    body = {"messages": ASK, "max_tokens": 2, "temperature": 0}
    before = served.http.post("/v1/chat/completions", json=body).json()["system_fingerprint"]
    with closing(open_stream(served, 200)) as raw:
        raw.recv(100)
        shutil.copy(file, served.file.with_suffix(".next"))
        served.file.with_suffix(".next").replace(served.file)
        assert served.http.post("/v1/chat/completions", json=body).json()["system_fingerprint"] != before
        assert b'"finish_reason":"length"' in read_all(raw)
    served.wait_until_idle()
    assert served.http.get("/health").json()["loaded"] == ["lamp"]


@pytest.mark.parametrize(
    ("seconds", "end"), [("30", b'"finish_reason":"length"'), ("0", b"the server is shutting down")]
)
def test_sigterm_in_mid_stream_finishes_or_cuts(endless: Path, seconds: str, end: bytes) -> None:
    server = start(endless, "--shutdown-timeout", seconds, "--slots", "2", "--preload")
    with server.http, ThreadPoolExecutor(6) as pool:
        streams = [open_stream(server, 220) for _ in range(6)]
        for raw in streams[:2]:
            assert raw.recv(1)
        server.process.send_signal(signal.SIGTERM)
        texts = list(pool.map(read_all, streams))
        assert server.process.wait(60) == 0
        for raw in streams:
            raw.close()
    assert all(text.rstrip(b"\r\n0").endswith(b"data: [DONE]") for text in texts)
    assert sum(end in text for text in texts) >= (6 if seconds == "30" else 1)
