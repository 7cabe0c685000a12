"""Bulk numbers as bytes, little-endian: what messages carry instead of lists."""

import sys
from array import array
from collections.abc import Iterable
from typing import Any


def _pack(typecode: str, values: Iterable[int] | Iterable[float]) -> bytes:
    numbers = array(typecode, values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _unpack(typecode: str, data: bytes) -> "array[Any]":
    numbers: array[Any] = array(typecode, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token or block ids as little-endian int32."""
    return _pack("i", ids)


def unpack_ids(data: bytes) -> "array[int]":
    """Inverse of pack_ids; the caller has checked that the length is a multiple of 4."""
    return _unpack("i", data)


def pack_request_ids(ids: Iterable[int]) -> bytes:
    """Request ids as little-endian int64."""
    return _pack("q", ids)


def unpack_request_ids(data: bytes) -> "array[int]":
    """Inverse of pack_request_ids."""
    return _unpack("q", data)


def pack_counts(counts: Iterable[int]) -> bytes:
    """How many there are of something, as little-endian int64."""
    return _pack("q", counts)


def unpack_counts(data: bytes) -> "array[int]":
    """Inverse of pack_counts; the caller has checked that the length is a multiple of 8."""
    return _unpack("q", data)


def pack_times(seconds: Iterable[float]) -> bytes:
    """Points in time as little-endian float64."""
    return _pack("d", seconds)


def unpack_times(data: bytes) -> "array[float]":
    """Inverse of pack_times."""
    return _unpack("d", data)


def pack_floats(values: Iterable[float]) -> bytes:
    """Log probabilities as little-endian float32."""
    return _pack("f", values)


def unpack_floats(data: bytes) -> "array[float]":
    """Inverse of pack_floats."""
    return _unpack("f", data)
