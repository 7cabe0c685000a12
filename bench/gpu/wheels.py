"""Packages brought along to a machine that has no registry.

    python -m bench.gpu.wheels split FOLDER BYTES    cut files that are larger than BYTES into parts
    python -m bench.gpu.wheels install TARGET        unpack what came along and is not here

A large file travels as NAME.part0, NAME.part1, ..., in as many trips as it takes; `install` joins
the parts, and says what is missing rather than unpack half a wheel.
"""

import importlib.metadata
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

WHEELS = Path(__file__).parents[1] / "wheels"
PART, LAST = ".part", "-last"


def split(folder: Path, most_bytes: int) -> list[Path]:
    """Cut every wheel above `most_bytes` into numbered parts, the last of which is marked."""
    made = []
    for wheel in sorted(folder.glob("*.whl")):
        data = wheel.read_bytes()
        if len(data) <= most_bytes:
            continue
        starts = range(0, len(data), most_bytes)
        for place, start in enumerate(starts):
            last = LAST if place == len(starts) - 1 else ""
            part = wheel.with_name(f"{wheel.name}{PART}{place}{last}")
            part.write_bytes(data[start : start + most_bytes])
            made.append(part)
        wheel.unlink()
    return made


def parts_of(folder: Path) -> dict[str, list[Path]]:
    """The parts of each wheel in their order, as far as they are there."""
    found: dict[str, dict[int, Path]] = {}
    for path in folder.rglob(f"*{PART}*"):
        name, _, number = path.name.rpartition(PART)
        found.setdefault(name, {})[int(number.removesuffix(LAST))] = path
    return {name: [parts[place] for place in sorted(parts)] for name, parts in found.items()}


def whole(parts: list[Path]) -> bool:
    """Whether these are all parts of a wheel: numbered from 0 on, the last one marked."""
    names = [part.name.rpartition(PART)[2] for part in parts]
    return names == [*map(str, range(len(parts) - 1)), f"{len(parts) - 1}{LAST}"]


def install(folder: Path, target: Path) -> list[str]:
    """Unpack the wheels below `folder` into `target`, a folder for PYTHONPATH.

    What is installed already is left as it is. Returns what could not be unpacked and why; the
    others are there all the same.
    """
    target.mkdir(parents=True, exist_ok=True)
    wheels = [wheel for wheel in sorted(folder.rglob("*.whl")) if not installed(wheel.name)]
    problems = [unpack(wheel, target) for wheel in wheels]
    for name, parts in sorted(parts_of(folder).items()):
        if installed(name):
            continue
        if not whole(parts):
            problems.append(f"{name}: of its parts only {len(parts)} came along")
            continue
        joined = target / name
        with joined.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        problems.append(unpack(joined, target))
        joined.unlink()
    return [problem for problem in problems if problem]


def installed(wheel: str) -> bool:
    """Whether the package of a wheel's file name is here, in whatever version."""
    try:
        importlib.metadata.version(wheel.partition("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def unpack(wheel: Path, target: Path) -> str:
    """A wheel is a zip file; ours have no scripts and no data folders. What is wrong, or ""."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if any(name.partition("/")[0].endswith(".data") for name in archive.namelist()):
                return f"{wheel.name}: it has a data folder and needs a real installer"
            archive.extractall(target)
    except zipfile.BadZipFile:
        return f"{wheel.name}: not a wheel"
    return ""


def main(words: list[str]) -> Iterator[str]:
    match words:
        case ["split", folder, size]:
            yield from map(str, split(Path(folder), int(size)))
        case ["install", target]:
            yield from install(WHEELS, Path(target))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    for text in main(sys.argv[1:]):
        print(text)
