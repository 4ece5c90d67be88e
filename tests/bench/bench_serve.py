"""Server under load: tokens a second, first-token time and memory for 1 to 32 streams, beside llama-server.

    make bench-serve ARGS="--seconds 60 model.gguf"

With `--stock` llama-server is measured as well. It is built from the source distribution of the pinned llama-cpp-python
(about ten minutes the first time), and runs on the same libraries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.bench import llama_programs

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples/smart-home/smart-home-q4_k_m.gguf"
STREAMS = (1, 4, 8, 32)
PROMPT = "Question {}: dim the bedroom lights to {}% and say which rooms are dark."


@dataclass
class Load:
    """What a number of streams has shown."""

    tokens: int = 0
    answers: int = 0
    lost: int = 0
    first: list[float] = field(default_factory=list)


def commands(model: Path, port: int, threads: int, slots: int, *, with_stock: bool) -> dict[str, list[str]]:
    """Name -> command line of each server, with the same threads, slots and context for each slot."""
    executable = str(Path(sys.executable).with_name("edgetune"))
    found = {
        "edgetune": [
            executable, "serve", str(model), "--port", str(port), "--threads", str(threads), "--slots", str(slots),
            "--context", "512", "--preload",
        ],
    }  # fmt: skip
    if with_stock:
        found["llama-server"] = [
            str(llama_programs.program("llama-server")), "-m", str(model),
            "--port", str(port), "-t", str(threads), "-np", str(slots), "-c",
            str(512 * slots), "--no-webui",
        ]  # fmt: skip
    return found


@contextmanager
def running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server from its first good answer on."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}/health"
            for _ in range(600):
                if server.poll() is not None:
                    sys.exit(f"{' '.join(command[:2])} ended with {server.returncode}")
                try:
                    if httpx.get(url, timeout=1).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
            yield server
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def resident(process: int) -> float:
    """Return the anonymous memory of a process in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def cpu_seconds(process: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def one_stream(client: httpx.AsyncClient, url: str, number: int, until: float, load: Load, tokens: int) -> None:
    """Ask one question after another until the time is over."""
    asked = 0
    while time.monotonic() < until:
        asked += 1
        body = {
            "messages": [{"role": "user", "content": PROMPT.format(asked, number)}], "max_tokens": tokens,
            "stream": True, "temperature": 1.0, "seed": number * 1000 + asked,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        started, is_first, usage, is_done = time.monotonic(), True, 0, False
        try:
            async with client.stream("POST", url + "/v1/chat/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    is_done = is_done or line == "data: [DONE]"
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    usage = (event.get("usage") or {}).get("completion_tokens", usage)
                    if is_first and any(choice["delta"].get("content") for choice in event["choices"]):
                        is_first = False
                        load.first.append(time.monotonic() - started)
        except httpx.HTTPError:
            is_done = False
        load.tokens += usage
        load.answers += is_done
        load.lost += not is_done


async def measure(url: str, streams: int, seconds: float, tokens: int) -> tuple[Load, float]:
    """Return what the streams have shown, and how long they took."""
    load, started = Load(), time.monotonic()
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        until = started + seconds
        await asyncio.gather(*(one_stream(client, url, number, until, load, tokens) for number in range(streams)))
    return load, time.monotonic() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of streams")
    parser.add_argument("--tokens", type=int, default=64, help="at most, of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, metavar="N")
    parser.add_argument("--stock", action="store_true", help="also measure llama-server")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(f"{options.model.name}, {options.threads} threads, {options.slots} slots, {options.seconds:g} s each")
    print("| server | streams | tokens/s | CPU a token | first token, median | 95 % | answers | lost | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    chosen = commands(options.model, port, options.threads, options.slots, with_stock=options.stock)
    for name, command in chosen.items():
        with running(command, port) as server:
            url = f"http://127.0.0.1:{port}"
            asyncio.run(measure(url, options.slots, min(2.0, options.seconds), options.tokens))  # fills the caches
            for streams in options.streams:
                before, used = resident(server.pid), cpu_seconds(server.pid)
                load, seconds = asyncio.run(measure(url, streams, options.seconds, options.tokens))
                after, used = resident(server.pid), cpu_seconds(server.pid) - used
                first = sorted(load.first) or [float("nan")]
                late = first[min(len(first) - 1, int(0.95 * len(first)))]
                print(
                    f"| {name} | {streams} | {load.tokens / seconds:.0f} | "
                    f"{used / max(load.tokens, 1) * 1e6:.0f} us | {statistics.median(first) * 1000:.0f} ms | "
                    f"{late * 1000:.0f} ms | {load.answers} | {load.lost} | {before:.0f}, {after:.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
