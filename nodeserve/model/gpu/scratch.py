"""Memory between two kernels of one operation."""

import torch


class Scratch:
    """One memory for what a linear leaves to the kernel after it, grown until it is reserved."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)
        self._width = 0
        self._fixed = False

    def need(self, width: int) -> None:
        """Some operation will ask for rows of this width."""
        self._width = max(self._width, width)

    def reserve(self, max_rows: int) -> None:
        self._grow(max_rows * self._width)
        self._fixed = True

    def rows(self, num_rows: int, width: int) -> torch.Tensor:
        """[num_rows, width] act, until the next call"""
        size = num_rows * width
        self._grow(size)
        return self._flat[:size].view(num_rows, width)

    def _grow(self, size: int) -> None:
        if size > self._flat.numel():
            assert not self._fixed, f"{size} values of scratch, reserved are {self._flat.numel()}"
            self._flat = self._flat.new_empty(size)
