"""A step's activations and scratch: memory that grows with the rows until it is reserved."""

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
        self._capacity = -1  # no rows need tensors too
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


class Scratch:
    """One memory for what an operation leaves to the next, grown until it is reserved."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)
        self._width = 0
        self._fixed = False
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def need(self, width: int) -> None:
        """Some operation will ask for rows of this width."""
        self._width = max(self._width, width)

    def reserve(self, max_rows: int) -> None:
        self._grow(max_rows * self._width)
        self._fixed = True

    def rows(self, num_rows: int, width: int) -> torch.Tensor:
        """[num_rows, width], until the next call"""
        view = self._views.get((num_rows, width))
        if view is None:
            size = num_rows * width
            self._grow(size)
            view = self._flat[:size].view(num_rows, width)
            self._views[num_rows, width] = view
        return view

    def _grow(self, size: int) -> None:
        if size > self._flat.numel():
            assert not self._fixed, f"{size} values of scratch, reserved are {self._flat.numel()}"
            self._views.clear()
            self._flat = self._flat.new_empty(size)
