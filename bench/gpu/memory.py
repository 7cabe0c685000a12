"""Device memory that torch did not allocate, as tensors, and torch's stream as a number."""

import ctypes

import torch


class _Span:
    """An address range in the words that torch takes over."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def view(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8 over memory of the device; whoever owns it keeps it alive."""
    if device.type == "cuda":
        return torch.as_tensor(_Span(address, num_bytes), device=device)
    return host_view(address, num_bytes)


def host_view(address: int, num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 over host memory."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def stream_of(device: torch.device) -> int:
    """Torch's current stream as the extension wants it; a CPU has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def settle(device: torch.device) -> None:
    """Wait for everything that torch has enqueued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
