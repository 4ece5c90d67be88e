"""The files that are served: loaded on demand within a memory limit, loaded again when they are replaced."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgetune import console
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.generation.adapters import parse_adapter
from edgetune.runtime.artifacts import artifact_format, has_score_head
from edgetune.runtime.engine import Engine
from edgetune.runtime.interface import Runtime
from edgetune.runtime.loading import load, load_text_model, require_file, reward_model_problem
from edgetune.runtime.machine_fit import find_fit
from edgetune.runtime.slots import SPECULATION, Speculation
from edgetune.serving.api_errors import ENGINE_CLOSED, ApiError, bad_request
from edgetune_converters.gguf import reader

Identity = tuple[tuple[str, int, int, int], ...]
"""(name, inode, size, time of change) of each file."""


@dataclass(frozen=True)
class LoadSettings:
    """How files are loaded.

    Attributes:
        threads: Threads that evaluate a model; None: as the runtime chooses.
        context: Tokens that a prompt and its answer may have together; None: the model's own, at most 4096.
        slots: Requests of a model that are decoded together.
        queue: Requests of a model that may wait.
        max_memory: Bytes that loaded files may have together; None: no limit.
        load_seconds: How long a request waits for its model.
        fits: Whether the settings are used that `edgetune fit` remembered; not with `is_exact`.
        speculation: How tokens are guessed ahead.
        is_exact: Whether prompts are evaluated without a cache of earlier ones.
    """

    threads: int | None = None
    context: int | None = None
    slots: int = 4
    queue: int = 64
    max_memory: int | None = None
    load_seconds: float = 120.0
    is_exact: bool = False
    fits: bool = True
    speculation: Speculation = SPECULATION


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that is loaded on a file, and that requests can name as a model of its own.

    Attributes:
        name: The name of the model: that of the file and that of the adapter, FILE:ADAPTER.
        path: The adapter.
        weight: What multiplies its change.
    """

    name: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class ServedFile:
    """A file that requests can name."""

    name: str
    path: Path
    format: str
    adapters: tuple[ServedAdapter, ...] = ()

    def identity(self) -> Identity:
        """Return what changes when the file or an adapter is replaced. Raises OSError."""
        paths = [self.path]
        if self.path.is_dir():
            paths = sorted(path for path in self.path.iterdir() if path.is_file())
        paths += [adapter.path for adapter in self.adapters]
        found = [(path.name, path.stat()) for path in paths]
        return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)

    def size(self) -> int:
        """Return its bytes on disk, with those of its adapters; 0 if it is not there."""
        try:
            return size_of(self.path) + sum(size_of(adapter.path) for adapter in self.adapters)
        except OSError:
            return 0

    def digest(self) -> str:
        """Return a SHA-256 of name and identity, which is the same until the file is replaced; nothing is read."""
        try:
            identity = self.identity()
        except OSError:
            identity = ()
        return hashlib.sha256(repr((self.name, identity)).encode()).hexdigest()

    @property
    def modified(self) -> float:
        """When it was changed, in seconds since 1970."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    return path.stat().st_size


@dataclass(eq=False)
class LoadedModel:
    """A file in memory, with its engine."""

    file: ServedFile
    runtime: Runtime
    engine: Engine
    identity: Identity
    size: int
    loaded: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    users: int = 0
    """Requests that are being answered with it."""
    is_broken: bool = False
    """Whether its engine was ended by an error: the next request loads the file again."""
    is_replaced: bool = False
    """Whether the file on disk is another one by now: closed when its last request has been answered."""

    def close(self) -> None:
        """End the engine and free the model."""
        self.engine.close()
        self.runtime.close()


@dataclass(frozen=True)
class NamedModel:
    """What a request can name: a file, alone or with one of its adapters."""

    name: str
    file: ServedFile
    adapters: tuple[tuple[str, float], ...] = ()
    """Names and weights of the adapters."""

    def digest(self) -> str:
        """Return what is the same until the file, an adapter or a weight is another one."""
        digest = self.file.digest()
        return hashlib.sha256(f"{digest}{self.adapters}".encode()).hexdigest() if self.adapters else digest


@dataclass(frozen=True)
class ModelUse:
    """A model in memory as one request uses it."""

    named: NamedModel
    loaded: LoadedModel

    @property
    def name(self) -> str:
        """The name under which the model answers."""
        return self.named.name

    @property
    def file(self) -> ServedFile:
        """The file of the base."""
        return self.loaded.file

    @property
    def runtime(self) -> Runtime:
        """The model."""
        return self.loaded.runtime

    @property
    def engine(self) -> Engine:
        """Its engine."""
        return self.loaded.engine

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """Names and weights of the adapters of the request."""
        return self.named.adapters

    def with_adapters(self, adapters: tuple[tuple[str, float], ...]) -> ModelUse:
        """Return the model with other adapters."""
        return replace(self, named=replace(self.named, adapters=adapters))


def served_files(arguments: Sequence[str]) -> dict[str, ServedFile]:
    """Return the files of FILE or NAME=FILE arguments, by name.

    Raises:
        ConfigError: Two files have one name.
        RuntimeProblem: There is no such file.
    """
    found: dict[str, ServedFile] = {}
    for argument in arguments:
        name, path = _name_and_path(argument)
        require_file(path)
        form = artifact_format(path)
        if form is None:
            load(path).close()  # raises the sentence for a directory that is no model
        if form == "gguf" and has_score_head(path):
            raise reward_model_problem(path)
        if name in found:
            raise ConfigError(
                f"{found[name].path} and {path} would both be called {name}", f"Give one another name: NAME={path}"
            )
        found[name] = ServedFile(name, path, form or "onnx")
    return found


def with_adapters(files: Mapping[str, ServedFile], arguments: Sequence[str]) -> dict[str, ServedFile]:
    """Return files with the adapters of [MODEL:]ADAPTER.gguf[=WEIGHT] arguments, MODEL being the name of a file.

    Raises:
        ConfigError: It is unclear or wrong to which file an adapter belongs, or two adapters have one name.
        RuntimeProblem: There is no such adapter.
    """
    found = dict(files)
    for argument in arguments:
        prefix, separator, rest = argument.partition(":")
        is_named = bool(separator) and prefix in found and not Path(argument).exists()
        adapter = parse_adapter(rest if is_named else argument)
        file = found[prefix] if is_named else _only_gguf(found, argument)
        _check_base(adapter.path, file)
        name = f"{file.name}:{adapter.path.stem}"
        if name in found or any(each.name == name for each in file.adapters):
            raise ConfigError(f"two adapters would be called {name}", f"Rename {adapter.path}")
        served = ServedAdapter(name, adapter.path, adapter.weight)
        found[file.name] = replace(file, adapters=(*file.adapters, served))
    return found


def _only_gguf(files: Mapping[str, ServedFile], argument: str) -> ServedFile:
    names = [name for name, file in files.items() if file.format == "gguf"]
    if not names:
        raise ConfigError(f"--adapter {argument}: no GGUF file is served, and others take no adapters", "Remove it")
    if len(names) > 1:
        raise ConfigError(
            f"--adapter {argument} could belong to {', '.join(names)}", f"Name one: --adapter {names[0]}:{argument}"
        )
    return files[names[0]]


def _check_base(adapter: Path, file: ServedFile) -> None:
    if file.format != "gguf":
        raise ConfigError(f"--adapter {adapter}: {file.path} takes no adapters", "Serve a GGUF file")
    try:
        names = [str(reader.read(path).metadata.get("general.architecture")) for path in (adapter, file.path)]
    except (EdgetuneError, OSError):
        return  # damaged: its requests say so
    if names[0] != names[1]:
        raise ConfigError(
            f"--adapter {adapter} is for an architecture {names[0]}, and {file.path} is {names[1]}",
            "Give the base that it was trained on",
        )


def _name_and_path(argument: str) -> tuple[str, Path]:
    name, separator, rest = argument.partition("=")
    if separator and name and not Path(argument).exists():
        return name, Path(rest)
    path = Path(argument)
    resolved = path.resolve()
    if resolved.name == "model.onnx":
        return resolved.parent.name, path
    return resolved.stem if resolved.suffix in (".gguf", ".onnx") else resolved.name, path


class ModelPool:
    """Loads files when requests name them, and frees the least recently used ones when memory is short."""

    def __init__(
        self, files: Mapping[str, ServedFile], settings: LoadSettings,
        open_model: Callable[[ServedFile, LoadSettings], tuple[Runtime, Engine]] | None = None,
    ) -> None:  # fmt: skip
        """Serve `files`; nothing is loaded yet. Raises ConfigError for a file that alone exceeds the memory limit."""
        self.files, self.settings = dict(files), settings
        self._named = {each.name: each for file in self.files.values() for each in _named_models(file)}
        self._open = open_model or _open_model
        self._models: dict[str, LoadedModel] = {}
        self._replaced: list[LoadedModel] = []
        self._loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self._reserved = 0
        self._changed = asyncio.Condition()
        self._unusable: dict[str, Identity] = {}
        """Replaced files that cannot be loaded, so that each is tried once."""
        self.loads = 0
        for file in files.values():
            if settings.max_memory is not None and file.size() > settings.max_memory:
                raise ConfigError(
                    f"{file.path} has {file.size()} bytes, and --max-memory permits {settings.max_memory}",
                    "Raise --max-memory, or leave the file out",
                )

    @property
    def loaded(self) -> list[LoadedModel]:
        """The models in memory."""
        return list(self._models.values())

    @property
    def models(self) -> dict[str, NamedModel]:
        """What requests can name, by name."""
        return dict(self._named)

    def find(self, name: str | None) -> NamedModel:
        """Return what a request names: a file, FILE:ADAPTER, or the name of an adapter alone if one file has it.

        Raises:
            ApiError: There is none of this name, or no name and several files.
        """
        if name is None:
            if len(self.files) == 1:
                return next(iter(self._named.values()))
            raise bad_request(f"the field model is missing; this server has {', '.join(self._named)}", "model")
        found = self._named.get(name) or self._named.get(name.removesuffix(":latest"))
        if found is None:
            ends = [each for each in self._named.values() if each.adapters and each.name.endswith(f":{name}")]
            if len(ends) == 1:
                return ends[0]
            raise ApiError(
                404, f"there is no model {name!r}; this server has {', '.join(self._named)}", "model", "model_not_found"
            )
        return found

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ModelUse]:
        """Lend the model of a request, loaded if it is not."""
        named = self.find(name)
        file = named.file
        try:
            async with asyncio.timeout(self.settings.load_seconds):
                model = await self._acquire(file)
        except TimeoutError:
            raise ApiError(503, f"the model {file.name} could not be loaded in time: memory is in use") from None
        try:
            yield ModelUse(named, model)
        except ApiError as error:
            model.is_broken = model.is_broken or error.code == ENGINE_CLOSED
            raise
        finally:
            model.users -= 1
            model.used = time.monotonic()
            await self._released(model)

    async def _acquire(self, file: ServedFile) -> LoadedModel:
        while True:
            model = self._models.get(file.name)
            if model is None or self._is_outdated(model):
                model = await self._load_once(file)
            if self._models.get(file.name) is model:  # not freed for another file meanwhile
                model.users += 1
                return model

    def _is_outdated(self, model: LoadedModel) -> bool:
        try:
            identity = model.file.identity()
        except OSError:
            return model.is_broken  # removed: what is loaded is still served
        return model.is_broken or identity not in (model.identity, self._unusable.get(model.file.name))

    async def _load_once(self, file: ServedFile) -> LoadedModel:
        """Load a file, or wait for another request that is loading it."""
        task = self._loading.get(file.name)
        if task is None:
            task = self._loading[file.name] = asyncio.create_task(self._load(file))
            task.add_done_callback(lambda _: self._loading.pop(file.name, None))
        return await asyncio.shield(task)

    async def _load(self, file: ServedFile) -> LoadedModel:
        identity: Identity = ()
        try:
            identity, size = file.identity(), file.size()
            await self._make_room(size)
            try:
                runtime, engine = await asyncio.to_thread(self._open, file, self.settings)
            finally:
                self._reserved -= size
        except (EdgetuneError, OSError) as problem:
            earlier = self._models.get(file.name)
            if earlier is None:
                raise ApiError(503, f"the model {file.name} cannot be loaded: {problem}", "model") from None
            console.warn(f"{file.path} was replaced, but cannot be loaded: {problem}; the earlier file is still served")
            self._unusable[file.name] = identity
            return earlier
        self.loads += 1
        earlier = self._models.get(file.name)
        model = self._models[file.name] = LoadedModel(file, runtime, engine, identity, size)
        if earlier is not None:
            console.note(f"{file.path} was replaced, or its engine failed; it has been loaded again")
            earlier.is_replaced = True
            self._replaced.append(earlier)
            await self._released(earlier)
        return model

    async def _make_room(self, size: int) -> None:
        """Reserve memory; free models that nobody uses, and wait for others."""
        limit = self.settings.max_memory
        async with self._changed:
            while limit is not None and self._used_memory() + size > limit:
                idle = [model for model in self._models.values() if not model.users]
                if not idle:
                    await self._changed.wait()
                    continue
                oldest = min(idle, key=lambda model: model.used)
                del self._models[oldest.file.name]
                await asyncio.to_thread(oldest.close)
            self._reserved += size

    def _used_memory(self) -> int:
        return self._reserved + sum(model.size for model in (*self._models.values(), *self._replaced))

    async def _released(self, model: LoadedModel) -> None:
        if model.is_replaced and not model.users and model in self._replaced:
            self._replaced.remove(model)
            await asyncio.to_thread(model.close)
        async with self._changed:
            self._changed.notify_all()

    async def cut(self) -> None:
        """End all answers; the models stay until the requests have read the end."""
        models = [*self._models.values(), *self._replaced]
        await asyncio.gather(*(asyncio.to_thread(model.engine.close) for model in models))

    async def close(self) -> None:
        """Free all models, when no request is being answered."""
        models = [*self._models.values(), *self._replaced]
        self._models.clear()
        self._replaced.clear()
        await asyncio.gather(*(asyncio.to_thread(model.close) for model in models))


def _named_models(file: ServedFile) -> Iterator[NamedModel]:
    yield NamedModel(file.name, file)
    for adapter in file.adapters:
        yield NamedModel(adapter.name, file, ((adapter.name, adapter.weight),))


def _open_model(file: ServedFile, settings: LoadSettings) -> tuple[Runtime, Engine]:
    fit = find_fit(file.path) if settings.fits and not settings.is_exact else None
    runtime = load_text_model(
        file.path, threads=settings.threads, context=settings.context, clip=True, fit=fit
    )  # fmt: skip
    if fit is not None:
        console.note(f"{file.path.name}: {fit.describe()}, as `edgetune fit` measured")
    with ExitStack() as undo:
        undo.callback(runtime.close)
        engine = Engine(
            runtime, slots=settings.slots, queue=settings.queue, is_exact=settings.is_exact,
            speculation=settings.speculation,
        )  # fmt: skip
        undo.callback(engine.close)
        for adapter in file.adapters:
            engine.load_adapter(adapter.path, adapter.name)
        undo.pop_all()
    return runtime, engine
