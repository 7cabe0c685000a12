"""What a judgement looks like."""

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"
AREAS = ("GPUs", "software", "machine", "start", "selftest")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. A problem keeps what was asked for from running; a warning makes it worse.

    `check` names the rule for scripts and does not change between versions.
    """

    area: str
    check: str
    mark: str
    text: str
    advice: str = ""  # what to do; empty where all is well


def size(num_bytes: int) -> str:
    """A size for people: "140.0 GiB"."""
    for unit, exponent in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << exponent:
            return f"{num_bytes / (1 << exponent):.1f} {unit}"
    return f"{num_bytes} bytes"


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def ranges(numbers: tuple[int, ...]) -> str:
    """Rising numbers, runs joined: "0-3,8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
