"""`edgetune serve`: answer clients of OpenAI, Anthropic and Ollama with exported files."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import click

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.generation.options import speculation_options

if TYPE_CHECKING:
    from edgetune.runtime.slots import Speculation

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ByteSize(click.ParamType[int]):
    """A number of bytes: 500M, 8G."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper().removesuffix("B").removesuffix("I")
        unit = text[-1:] if text[-1:] in ("K", "M", "G") else ""
        try:
            size = float(text.removesuffix(unit)) * _UNITS[unit]
            if not 0 < size < 2**62:
                raise ValueError
        except ValueError:
            self.fail(f"{value!r} is not a size; write for instance 500M or 8G", param, ctx)
        return int(size)


@click.command(name="serve")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 chooses a free one."
)
@click.option(
    "--api-key",
    envvar="EDGETUNE_API_KEY",
    show_envvar=True,
    help="Key that each request must carry. Other users of this machine can read a command line: set the variable.",
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Name of this server in Host headers, beside localhost and addresses (repeatable).",
)
@click.option(
    "--cors-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of web pages that may use the server, such as http://localhost:3000; * permits all (repeatable).",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[MODEL:]FILE[=WEIGHT]",
    help="GGUF LoRA adapter on the file MODEL; requests name both as MODEL:ADAPTER, and MODEL alone is without it "
    "(repeatable). MODEL can be left out if one GGUF file is served.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: the physical cores.")
@click.option(
    "--context",
    type=click.IntRange(min=8),
    help="Context size in tokens, for prompt and answer. Default: at most 4096.",
)
@click.option(
    "--slots",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Requests of a file that are decoded together.",
)
@click.option(
    "--queue", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Requests of a file that may wait."
)
@click.option("--max-memory", type=ByteSize(), help="Size that loaded files may have together, such as 8G.")
@click.option(
    "--max-body", type=ByteSize(), default="16M", show_default=True, help="Size that a request's body may have."
)
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Requests that are answered or wait at once.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    help="Seconds for a request and its reply.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds for running answers after SIGTERM or Ctrl-C; then they are cut.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Temperature of requests that give none.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Decode one request at a time and without a cache, so that a result depends on its request alone.",
)
@click.option("--no-fit", is_flag=True, help="Do not use the settings that `edgetune fit` remembered for the files.")
@speculation_options
@click.option("--preload", is_flag=True, help="Load all files at the start, instead of on demand.")
def command(
    files: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    allowed_hosts: tuple[str, ...],
    origins: tuple[str, ...],
    adapters: tuple[str, ...],
    threads: int | None,
    context: int | None,
    slots: int,
    queue: int,
    max_memory: int | None,
    max_body: int,
    max_requests: int,
    request_timeout: float,
    shutdown_timeout: float,
    temperature: float,
    exact: bool,
    preload: bool,
    no_fit: bool,
    speculation: Speculation,
) -> None:
    """Answer clients of OpenAI, Anthropic and Ollama with exported files, on the CPU.

    A request names a file by its name without .gguf. NAME=FILE gives it another name.

    \b
    Examples:
      edgetune serve model.gguf
      edgetune serve model.gguf --adapter formal.gguf --adapter brief.gguf=0.5
      edgetune serve small=a-q4_k_m.gguf large=b-q8_0.gguf --max-memory 8G --port 11434
    """
    from edgetune.runtime.sampling import Sampling
    from edgetune.serving.calls import Server, ServerSettings
    from edgetune.serving.loaded_files import LoadSettings, ModelPool, served_files, with_adapters
    from edgetune.serving.security import AccessRules
    from edgetune.serving.server import ListenSettings, bind, serve, url_of

    if not api_key and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no API key",
            "Set EDGETUNE_API_KEY, or listen on 127.0.0.1",
        )
    if exact and speculation.draft is not None:
        raise ConfigError("--draft cannot be used with --exact, which guesses nothing", "Remove one of them")
    served = with_adapters(served_files(files), adapters)
    hosts = frozenset(name.lower() for name in (host, *allowed_hosts))
    access = AccessRules(hosts, frozenset(origin.rstrip("/") for origin in origins), api_key or None)
    settings = ServerSettings(
        access, max_body, max_requests, request_timeout, sampling=Sampling(temperature), is_exact=exact
    )
    loading = LoadSettings(
        threads,
        context,
        1 if exact else slots,
        queue,
        max_memory,
        is_exact=exact,
        fits=not no_fit,
        speculation=speculation,
    )
    pool = ModelPool(served, loading)
    server = Server(pool, settings)
    listening = bind(ListenSettings(host, port))
    console.note(f"serving {', '.join(pool.models)} on {url_of(listening)}")
    serve(server, listening, shutdown_timeout, preload=preload)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
