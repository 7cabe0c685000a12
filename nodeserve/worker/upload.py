"""Tensors from mapped files to the GPU, through two pinned buffers that take turns.

A copy from memory that is not pinned goes through a buffer of the driver's, on one core. Ours are
filled by all of the worker's threads, straight from the mapped file, while the other one is on its
way. No tensor is ever whole in host memory but for the system's own copy of the file.
"""

import torch

from nodeserve.worker.gpu_runtime import Mark, Runtime

CHUNK_BYTES = 64 << 20


class Uploader:
    """What model.loader.Upload asks for."""

    def __init__(self, runtime: Runtime, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.device = runtime.device
        self._runtime = runtime
        self._chunks = [runtime.pinned(chunk_bytes, torch.uint8) for _ in range(2)]
        self._readers: list[Mark | None] = [None, None]
        self._turn = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source, place = _bytes_of(tensor), _bytes_of(target)
        size = self._chunks[0].numel()
        for first in range(0, source.numel(), size):
            self._send(source[first : first + size], place[first : first + size])
        return target

    def _send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._turn ^= 1
        if (reader := self._readers[self._turn]) is not None:
            reader.synchronize()
        chunk = self._chunks[self._turn][: source.numel()]
        chunk.copy_(source)
        target.copy_(chunk, non_blocking=True)
        self._readers[self._turn] = self._runtime.mark()

    def close(self) -> None:
        """Wait for the last copies; the pinned memory goes with this object."""
        for reader in self._readers:
            if reader is not None:
                reader.synchronize()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
