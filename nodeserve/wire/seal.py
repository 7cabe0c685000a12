"""A checksum behind each record of a ring, over its bytes and its number in the row.

The ring itself keeps records whole whoever is killed; this finds what it cannot: bytes that
somebody wrote over, a record that is missing, one that came twice.
"""

import zlib

from nodeserve.errors import RingError

SEAL_BYTES = 4


def seal(record: bytes, number: int) -> bytes:
    """`record` as it goes into the ring, as the `number`-th since the ring was made."""
    return record + _checksum(record, number)


def unseal(sealed: bytes, number: int) -> bytes:
    """The record. RingError if it is not what was put there as the `number`-th."""
    record = sealed[:-SEAL_BYTES]
    if sealed[-SEAL_BYTES:] != _checksum(record, number):
        raise RingError(f"record {number} of {len(sealed)} bytes is damaged or out of order")
    return record


def _checksum(record: bytes, number: int) -> bytes:
    return zlib.crc32(record, number & 0xFFFF_FFFF).to_bytes(SEAL_BYTES, "little")
