"""Changes inputs at random, where no tool is there that sees what an input reaches."""

import random
import time

from tests.fuzz.targets import Target

_NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    127,
    128,
    255,
    256,
    65_535,
    2**31 - 1,
    2**32 - 1,
    2**63,
    2**64 - 1,
]
_WORDS = [
    b"NaN",
    b"1e999",
    b"-1",
    b"null",
    b"{}",
    b"[]",
    b"..",
    b"\x00",
    b"\xff",
    b'"',
    b"[" * 2000,
]


def run(target: Target, seconds: float, seed: int) -> int:
    """Run changed seeds for so long; how many. What a target raises leaves with its input noted."""
    chance, inputs = random.Random(seed), target.seeds()
    end_s = time.monotonic() + seconds
    num_runs = 0
    while time.monotonic() < end_s:
        data = changed(chance, inputs)[: target.max_bytes]
        try:
            target.run(data)
        except BaseException as problem:
            problem.add_note(f"input of {target.name}: bytes.fromhex('{data.hex()}')")
            raise
        num_runs += 1
    return num_runs


def changed(chance: random.Random, inputs: list[bytes]) -> bytes:
    """One of the inputs after a few changes."""
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.choice([1, 1, 2, 3, 8])):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                size = chance.choice([1, 2, 4, 8])
                number = chance.choice(_NUMBERS) % 2 ** (8 * size)
                data[at : at + size] = number.to_bytes(size, chance.choice(["little", "big"]))
            case 2:
                del data[at : at + chance.randint(1, 1 + len(data) // 4)]
            case 3:
                data[at:at] = data[at : at + chance.randint(1, 64)]
            case 4:
                other = chance.choice(inputs)
                data[at:] = other[chance.randrange(len(other) + 1) :]
            case 5:
                data[at:at] = chance.choice(_WORDS)
            case 6:
                data[at : at + 1] = str(chance.choice(_NUMBERS)).encode()
    return bytes(data)
