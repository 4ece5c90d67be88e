"""Datasets of the Hugging Face hub, of ModelScope, and of folders that the datasets library reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from edgetune.data.row_files import PlacedRow, plain_value
from edgetune.errors import DataError, EnvironmentProblem

HUB_PREFIXES = (
    "hf::", "ms::", "hf://datasets/", "https://huggingface.co/datasets/", "https://modelscope.cn/datasets/",
    "https://www.modelscope.cn/datasets/",
)  # fmt: skip
"""Beginnings of names that are datasets of a hub; without one, a name is of the Hugging Face hub."""


@dataclass
class HubDataset:
    """A dataset of a hub, loaded without running its code."""

    hub: str
    """hf, ms, or folder: a local folder that the datasets library reads."""
    name: str
    subset: str | None
    split: str
    limit: int | None = None
    folder: str | None = None
    """The folder of the dataset that is read."""
    notes: list[str] = field(default_factory=list)
    revision: str | None = None

    def rows(self) -> Iterator[PlacedRow]:
        """Yield the rows with their places.

        Raises:
            DataError: If the dataset cannot be loaded.
            EnvironmentProblem: If the library that loads it is not installed.
        """
        table = self._load_modelscope() if self.hub == "ms" else self._load_datasets()
        for number, row in enumerate(islice(table, self.limit), 1):
            yield f"{self.name}, row {number}", plain_value(dict(row))

    def identity(self) -> dict[str, Any]:
        """Return name, subset, split and revision."""
        place = {"path": self.name} if self.hub == "folder" else {"dataset": self.name}
        hub = {"hub": "modelscope"} if self.hub == "ms" else {}
        folder = {"folder": self.folder} if self.folder else {}
        return {**place, **hub, **folder, "subset": self.subset, "split": self.split, "revision": self.revision}

    def _load_datasets(self) -> Iterable[Any]:
        try:
            import datasets
            from huggingface_hub import HfApi
        except ImportError:
            raise EnvironmentProblem(
                f"the dataset {self.name} needs datasets", "Run `pip install 'edgetune[train]'`"
            ) from None
        datasets.disable_progress_bars()
        piece = f"{self.split}[:{self.limit}]" if self.limit and "[" not in self.split else self.split
        try:
            if self.hub == "hf" and not datasets.config.HF_HUB_OFFLINE:
                self.revision = HfApi().dataset_info(self.name).sha
            folder = {"data_dir": self.folder} if self.folder else {}
            table: Iterable[Any] = datasets.load_dataset(
                self.name, self.subset, split=piece, revision=self.revision, **folder
            )
        except Exception as error:  # noqa: BLE001 - the many errors of the hub need the same answer
            what = "cannot be read as a dataset" if self.hub == "folder" else (
                "is neither a file nor a Hugging Face dataset that can be loaded"
            )  # fmt: skip
            raise DataError(
                f"{self.name} {what}: {_first_line(error)}",
                "Check the path, the name, the subset (NAME:SUBSET), the split (data.split, or NAME@SPLIT) "
                "and the network",
            ) from None
        return table

    def _load_modelscope(self) -> Iterable[Any]:
        try:
            from modelscope.msdatasets import MsDataset
        except ImportError:
            raise EnvironmentProblem(
                f"the dataset {self.name} of ModelScope needs modelscope", "Run `pip install modelscope`"
            ) from None
        subset = {"subset_name": self.subset} if self.subset else {}
        subset |= {"data_dir": self.folder} if self.folder else {}
        try:
            table: Iterable[Any] = MsDataset.load(self.name, split=self.split, **subset)
        except Exception as error:  # noqa: BLE001 - as for the Hugging Face hub
            raise DataError(
                f"the dataset {self.name} of ModelScope cannot be loaded: {_first_line(error)}",
                "Check the name, the subset (NAME:SUBSET), the split (data.split, or NAME@SPLIT) and the network",
            ) from None
        return table


def hub_dataset(location: str, subset: str | None, split: str, limit: int | None) -> HubDataset | None:
    """Return the dataset that a name with a prefix means; None for a name without one."""
    prefix = next((prefix for prefix in HUB_PREFIXES if location.lower().startswith(prefix)), None)
    if prefix is None:
        return None
    hub = "ms" if "modelscope" in prefix or prefix == "ms::" else "hf"
    return HubDataset(hub, location[len(prefix) :].strip("/"), subset, split, limit)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
