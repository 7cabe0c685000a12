"""A step's activations: one memory for each kind, for any number of rows."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

B = TypeVar("B")


class Workspace(Generic[B]):
    """Buffers for any number of rows, kept between steps and grown until they are reserved."""

    def __init__(
        self,
        make: Callable[..., B],
        columns: Sequence[tuple[int, torch.dtype]],
        device: torch.device,
    ) -> None:
        """`make` takes a tensor [rows, width] for each (width, dtype) of `columns`, in order."""
        self._make = make
        self._columns = columns
        self._device = device
        self._whole: list[torch.Tensor] = []
        self._capacity = 0
        self._fixed = False
        self._views: dict[int, B] = {}

    def reserve(self, max_rows: int) -> None:
        """Room for `max_rows`, for good: captured graphs hold these addresses."""
        if max_rows > self._capacity:
            self._grow(max_rows)
        self._fixed = True

    def rows(self, num_rows: int) -> B:
        views = self._views.get(num_rows)
        if views is None:
            if num_rows > self._capacity:
                self._grow(num_rows)
            views = self._make(*(whole[:num_rows] for whole in self._whole))
            self._views[num_rows] = views
        return views

    def _grow(self, num_rows: int) -> None:
        assert not self._fixed, f"{num_rows} rows, reserved are {self._capacity}"
        self._capacity = max(num_rows, 2 * self._capacity)
        self._views.clear()
        self._whole = [
            torch.zeros(self._capacity, width, dtype=dtype, device=self._device)
            for width, dtype in self._columns
        ]
