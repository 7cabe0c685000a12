"""What copy_pages refuses, and how it fails."""

from typing import Any

import numpy as np
import pytest

from nodeserve.errors import BadArgument, CudaError
from tests.fakes.cuda import bytes_at
from tests.fakes.cuda.copies import Copy, whole

REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"^target must be an address .*, got 0", {"target": 0}),
    (r"^source must be an address .*, got 0", {"source": 0}),
    (r"^target must be .*, got 4104", {"target": 4104}),
    (r"^source must be .*, got 4097", {"source": 4097}),
    (r"^target_stride must be .*, got 0", {"target_stride": 0}),
    (r"^source_stride must be .*, got -64", {"source_stride": -64}),
    (r"^target_stride must be .*, got 72", {"target_stride": 72}),
    (r"^source_stride must be .* up to", {"source_stride": 2**36}),
    (r"^target_bytes must be whole blocks of 64 bytes, got 0", {"target_bytes": 0}),
    (r"^target_bytes must be .*, got -64", {"target_bytes": -64}),
    (r"^source_bytes must be whole blocks of 64 bytes, got 80", {"source_bytes": 80}),
    (
        r"^target_bytes: .* leave the address space",
        {"target_bytes": 2**63 - 64, "target": 2**64 - 64},
    ),
    (r"^pairs\[1\]: target block -1 is outside the 8", {"pairs": [[0, 0], [-1, 0]]}),
    (r"^pairs\[0\]: target block 8 is outside the 8", {"pairs": [[8, 0]]}),
    (r"^pairs\[0\]: source block -3 is outside the 8", {"pairs": [[0, -3]]}),
    (r"^pairs\[0\]: source block 8 is outside the 8", {"pairs": [[0, 8]]}),
    (r"^pairs: target block 5 is written twice", {"pairs": [[5, 0], [1, 1], [5, 2]]}),
    (r"^runs\[0\]: its bytes must be positive, got 0", {"runs": [[0, 0, 0]]}),
    (r"^runs\[0\]: its bytes must be positive, got -16", {"runs": [[0, 0, -16]]}),
    (r"^runs\[0\]: offsets and bytes must be mul", {"runs": [[8, 0, 16]]}),
    (r"^runs\[0\]: offsets and bytes must be mul", {"runs": [[0, 8, 16]]}),
    (r"^runs\[1\]: offsets and bytes must be mul", {"runs": [[0, 0, 16], [16, 0, 20]]}),
    (r"^runs\[0\]: 16 bytes at target offset -16 leave", {"runs": [[-16, 0, 16]]}),
    (r"^runs\[0\]: 16 bytes at source offset -16 leave", {"runs": [[0, -16, 16]]}),
    (r"^runs\[0\]: 32 bytes at target offset 48 leave", {"runs": [[48, 0, 32]]}),
    (r"^runs\[0\]: 32 bytes at source offset 48 leave", {"runs": [[0, 48, 32]]}),
    (r"^runs\[0\]: 16 bytes at target offset 96 leave", {"runs": [[96, 0, 16]]}),
    (r"^runs\[0\]: \d+ bytes at target offset 16 leave", {"runs": [[16, 0, 2**63 - 16]]}),
    (
        r"^runs: two of them write the bytes at target offset 16",
        {"runs": [[16, 0, 16], [0, 0, 32]]},
    ),
    (r"^method must be \"auto\", \"kernel\" or \"batch\", got \"dma\"", {"method": "dma"}),
    (r"^method \"batch\" needs a stream of its own", {"method": "batch", "stream": 0}),
    (r"^method \"batch\" needs a stream of its own", {"method": "batch", "stream": 1}),
    (r"^stream must be a cudaStream_t .*, got 12", {"stream": 12}),
    (r"^max_thread_blocks must be positive, .* got -1", {"max_thread_blocks": -1}),
    (r"^pairs must hold int32", {"pairs": np.zeros((1, 2), np.int64)}),
    (r"^runs must hold int64", {"runs": np.zeros((1, 3), np.int32)}),
    (r"^runs must hold int64", {"runs": np.zeros((1, 3), np.float64)}),
    (r"^pairs must have the shape \[n, 2\]", {"pairs": np.zeros((2, 3), np.int32)}),
    (r"^pairs must have the shape \[n, 2\]", {"pairs": np.zeros(4, np.int32)}),
    (r"^runs must have the shape \[n, 3\]", {"runs": np.zeros((3, 1), np.int64)}),
    (r"^pairs must be contiguous", {"pairs": np.zeros((2, 4), np.int32)[:, ::2]}),
]


@pytest.mark.parametrize(("message", "changes"), REFUSED, ids=lambda value: str(value)[:60])
def test_bad_requests_are_refused_before_cuda_is_asked(
    cuda: Any, message: str, changes: dict[str, Any]
) -> None:
    copy = Copy(cuda, (8, 8), (64, 64), np.array([[0, 1]], np.int32), whole(64))
    types = {"pairs": np.int32, "runs": np.int64}
    given: dict[str, Any] = {
        name: np.array(value, types[name]) if isinstance(value, list) else value
        for name, value in changes.items()
    }
    asked = cuda.fake.calls("cudaStreamGetDevice")
    with pytest.raises(BadArgument, match=message):
        copy.start(**{"method": "kernel"} | given)
    assert (cuda.fake.calls("cudaStreamGetDevice"), cuda.fake.num_pending()) == (asked, 0)


def test_what_a_request_reads_it_does_not_write(cuda: Any) -> None:
    """Within one pool the result would depend on the order of the copies."""
    copy = Copy(cuda, (8, 8), (64, 64), np.array([[0, 1], [1, 2]], np.int32), whole(64))
    same = {"target": copy.source.address}
    with pytest.raises(BadArgument, match="pairs: block 1 of the target is read by the same req"):
        copy.start("kernel", **same)
    with pytest.raises(BadArgument, match="read by the same request"):
        copy.start("kernel", **same, pairs=np.array([[5, 5]], np.int32))
    with pytest.raises(BadArgument, match="read by the same request"):  # shifted by half a block
        moved = {"target": copy.source.address + 32, "target_bytes": 7 * 64}
        copy.start("kernel", **moved, pairs=np.array([[2, 3]], np.int32))
    halves = np.array([[0, 32, 32]], np.int64)
    assert copy.start("kernel", **same, pairs=np.array([[5, 5]], np.int32), runs=halves) == 1
    assert copy.start("kernel", **same, pairs=np.array([[0, 1], [2, 1]], np.int32)) == 1
    copy.stream.synchronize()
    blocks = bytes_at(copy.source.address, 512).reshape(8, 2, 32)
    assert (blocks[0] == blocks[1]).all() and (blocks[2] == blocks[1]).all()
    assert (blocks[5, 0] == blocks[5, 1]).all()


@pytest.mark.parametrize(
    "changes", [{"target": -16}, {"pairs": None}, {"runs": "abc"}, {"stream": "0"}, {"method": 3}]
)
def test_wrong_types_are_refused(cuda: Any, changes: dict[str, Any]) -> None:
    copy = Copy(cuda, (8, 8), (64, 64), np.array([[0, 1]], np.int32), whole(64))
    with pytest.raises((TypeError, BufferError)):
        copy.start(**{"method": "kernel"} | changes)


@pytest.mark.parametrize(
    ("method", "function", "place"),
    [
        ("kernel", "cudaLaunchKernel", r"copy_kernel\.cu"),
        ("kernel", "cudaDeviceGetAttribute", r"copy\.cpp"),
        ("kernel", "cudaStreamGetDevice", r"copy\.cpp"),
        ("batch", "cudaMemcpyBatchAsync", r"copy\.cpp"),
        ("batch", "cudaSetDevice", r"device\.cpp"),
    ],
)
def test_failed_copies_have_the_place_and_cudas_words(
    cuda: Any, method: str, function: str, place: str
) -> None:
    copy = Copy(cuda, (8, 8), (64, 64), np.array([[0, 1]], np.int32), whole(64))
    cuda.fake.fail(function, number=700)
    with pytest.raises(
        CudaError, match=rf"^csrc/kv/{place}:\d+ {function}: an illegal memory access was enc"
    ):
        copy.start(method)


def test_a_closed_stream_is_cudas_error(cuda: Any) -> None:
    copy = Copy(cuda, (8, 8), (64, 64), np.array([[0, 1]], np.int32), whole(64))
    handle = copy.stream.handle
    copy.stream.close()
    with pytest.raises(CudaError, match="cudaStreamGetDevice: invalid resource handle"):
        copy.start("kernel", stream=handle)
