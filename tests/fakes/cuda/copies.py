"""A copy between two pools of the fake devices, and what numpy says of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fakes.cuda.memory import bytes_at

METHODS = ["kernel", "batch", "auto"]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass
class Copy:
    """Two pools of blocks, the source full of noise, and a request between them."""

    cuda: Any
    num_blocks: tuple[int, int]  # target, source
    strides: tuple[int, int]
    pairs: Int32  # [n, 2]
    runs: Int64  # [m, 3]
    device: int = 0  # of the target and the stream
    local: bool = False  # the source is this device's too, else the other's

    def __post_init__(self) -> None:
        target_bytes, source_bytes = (
            n * s for n, s in zip(self.num_blocks, self.strides, strict=True)
        )
        self.target = self.cuda.Pool(self.device, target_bytes)
        self.source = self.cuda.Pool(self.device if self.local else 1 - self.device, source_bytes)
        self.stream = self.cuda.Stream(self.device)
        noise = np.random.default_rng(5).integers(0, 256, source_bytes, np.uint8)
        bytes_at(self.source.address, source_bytes)[:] = noise

    def start(self, method: str, **changes: Any) -> int:
        arguments: dict[str, Any] = {
            "target": self.target.address,
            "target_bytes": self.target.num_bytes,
            "source": self.source.address,
            "source_bytes": self.source.num_bytes,
            "pairs": self.pairs,
            "runs": self.runs,
            "target_stride": self.strides[0],
            "source_stride": self.strides[1],
            "method": method,
        }
        if "stream" not in changes:
            arguments["stream"] = self.stream.handle
        launches: int = self.cuda.copy_pages(**arguments | changes)
        return launches

    def arrived(self) -> npt.NDArray[np.uint8]:
        self.stream.synchronize()
        return bytes_at(self.target.address, self.target.num_bytes).reshape(self.num_blocks[0], -1)

    def expected(self) -> npt.NDArray[np.uint8]:
        source = bytes_at(self.source.address, self.source.num_bytes).reshape(
            self.num_blocks[1], -1
        )
        target = np.zeros((self.num_blocks[0], self.strides[0]), np.uint8)
        for there, here in self.pairs:
            for to, start, num_bytes in self.runs:
                target[there, to : to + num_bytes] = source[here, start : start + num_bytes]
        return target


def whole(num_bytes: int) -> Int64:
    return np.array([[0, 0, num_bytes]], np.int64)
