"""Looking at the fake devices' memory."""

import ctypes

import numpy as np
import numpy.typing as npt


def bytes_at(address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    """[num_bytes] uint8, the memory itself; it must stay mapped as long as the array is used."""
    memory = memoryview((ctypes.c_uint8 * num_bytes).from_address(address))
    return np.frombuffer(memory, np.uint8)
