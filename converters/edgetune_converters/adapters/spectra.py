"""Changes that are given by some of their coefficients: FourierFT, WaveFT.

The places of the coefficients are not stored: they are the first of a permutation that follows from a seed.
Sources: PEFT, tuners/fourierft/layer.py, tuners/waveft/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold
from edgetune_converters.adapters.change import added
from edgetune_converters.adapters.matching import MERGE_FIRST, Kind
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.sparse import SparseMatrix
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.adapters.torch_random import first_of_permutation
from edgetune_converters.errors import OnlyPeftError
from edgetune_converters.tensors import F32, RowIndex

_SEED = 777


def _places(module: AdaptedModule, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns of the coefficients."""
    seed = module.config.integer("random_loc_seed", _SEED)
    return np.divmod(first_of_permutation(module.rows * module.columns, count, seed), module.columns)


# -- FourierFT ---------------------------------------------------------------------------------------------------------


def _fourierft(module: AdaptedModule) -> Iterator[Fold]:
    (count,) = module.shape("spectrum")
    spectrum = module.tensor("spectrum", (count,))
    scale = module.config.number("scaling", 150.0)

    def delta() -> Callable[[RowIndex, RowIndex], F32]:
        rows, columns = _places(module, count)
        return _InverseFourier(rows, columns, spectrum() * scale, module.rows, module.columns)

    yield Fold(added(delta), changes_nothing=lambda: not spectrum().any())


class _InverseFourier:
    """The real part of the inverse Fourier transform of a matrix with few coefficients, by rows, in f64."""

    def __init__(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.floating], height: int, width: int
    ) -> None:
        self._row, self._height, self._width = rows, height, width
        self._values = values.astype(np.float64) / height
        self._column = columns
        turns = [2 * math.pi * step / height for step in range(height)]
        # of the C library, which gives the same values on every processor
        self._circle = np.array([complex(math.cos(turn), math.sin(turn)) for turn in turns])

    def __call__(self, rows: RowIndex, columns: RowIndex) -> F32:
        numbers = np.arange(self._height)[rows]
        waves = self._circle[np.outer(self._row, numbers) % self._height] * self._values[:, None]
        spectrum = np.zeros((self._width, len(numbers)), np.complex128)
        np.add.at(spectrum, self._column, waves)
        found: F32 = np.fft.ifft(spectrum, axis=0).real.T.astype(np.float32)
        return np.ascontiguousarray(found[:, columns])


# -- WaveFT ------------------------------------------------------------------------------------------------------------

_HALF_ROOT = math.sqrt(0.5)
# wavelet -> its low-pass filter of reconstruction (Daubechies); the longer ones have no closed form
_WAVELETS: Mapping[str, tuple[float, ...]] = {
    "db1": (_HALF_ROOT, _HALF_ROOT),
    "db2": tuple(
        (a + b * math.sqrt(3)) / (4 * math.sqrt(2)) for a, b in ((1, 1), (3, 1), (3, -1), (1, -1))
    ),
}  # fmt: skip


def _waveft(module: AdaptedModule) -> Iterator[Fold]:
    (count,) = module.shape("spectrum")
    spectrum = module.tensor("spectrum", (count,))
    scale = module.config.number("scaling", 25.0)
    shape = module.rows, module.columns

    def delta() -> SparseMatrix:
        rows, columns = _places(module, count)
        values = spectrum().reshape(-1) * scale
        if module.config.flag("use_idwt", default=True):
            low = _WAVELETS[module.config.raw.get("wavelet_family", "db1")]
            rows, columns, values = _inverse_wavelet(rows, columns, values, shape, low)
        return SparseMatrix.sorted_by_row(rows, columns, values.astype(np.float32), shape)

    yield Fold(added(delta), changes_nothing=lambda: not spectrum().any())


def _inverse_wavelet(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    values: NDArray[np.floating],
    shape: tuple[int, int],
    low: tuple[float, ...],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return places and values of one step of reconstruction; each coefficient reaches len(low)**2 places.

    The coefficients lie in the middle of a matrix that is larger by the length of the filter, and even; its quadrants
    are the bands. The result is cut to its middle.
    """
    row, below = _reached(rows, shape[0], low)
    column, right = _reached(columns, shape[1], low)
    filters = np.array([low, [low[-1 - step] * (-1) ** step for step in range(len(low))]])
    # the quadrant to the right holds what varies along a column, that below what varies along a row
    row_weight, column_weight = filters[right], filters[below]
    weight = values[:, None, None] * row_weight[:, :, None] * column_weight[:, None, :]
    places = np.broadcast_arrays(row[:, :, None], column[:, None, :])
    inside = (places[0] >= 0) & (places[0] < shape[0]) & (places[1] >= 0) & (places[1] < shape[1])
    return places[0][inside], places[1][inside], weight[inside]


def _reached(
    places: NDArray[np.int64], count: int, low: tuple[float, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each coefficient goes along one axis, [coefficients, len(low)], and its half: 0 or 1."""
    length = len(low)
    padded = count + length - 2
    padded += padded % 2
    half = padded // 2
    band, inside = np.divmod(places + (padded - count) // 2, half)
    cut = (2 * length - 3) // 2
    made = 2 * half + length - 2 - 2 * cut
    target = 2 * inside[:, None] + np.arange(length) - cut
    target = np.where((target >= 0) & (target < made), target - (made - count) // 2, -1)
    return target, band


def _check_wavelet(config: PeftConfig) -> None:
    family = config.raw.get("wavelet_family", "db1")
    if config.flag("use_idwt", default=True) and family not in _WAVELETS:
        raise OnlyPeftError(
            f"the adapter uses the wavelet {family!r}; those that can be merged are {', '.join(_WAVELETS)}", MERGE_FIRST
        )


FOURIERFT = Kind(
    RoleNames("FourierFT", ("fourierft_spectrum",), prefix="fourierft_"),
    _fourierft,
    fields=frozenset({"n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "bias", "init_weights"}),
)
WAVEFT = Kind(
    RoleNames("WaveFT", ("waveft_spectrum",), prefix="waveft_"),
    _waveft,
    fields=frozenset(
        {
            *("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "bias", "init_weights"),
            *("wavelet_family", "use_idwt", "proportional_parameters"),
        }
    ),
    check=_check_wavelet,
)
