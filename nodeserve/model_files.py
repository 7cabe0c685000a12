"""Reads the text files of a model, none of which is trusted, and looks up typed values in them.

Only regular files are opened: a pipe would hang us, a device would never end. Text is read up to a
limit and only where it belongs: a link may not lead out of the model's folder, or whatever it names
could end up in a prompt. (The hub's cache is made of links; those are known.) The file that was
opened is the one that is judged, not its name.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nodeserve.errors import ModelError
from nodeserve.types import shown

MAX_JSON_BYTES = 64 << 20  # an index of 400,000 tensors
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_SIZE = 1 << 24  # of a vocabulary, a hidden state, ...
MAX_POSITION = 2**31 - 1
MAX_TOKEN_ID = 2**31 - 1  # an int32 on the wire
MAX_END_TOKENS = 1024


def open_regular(path: Path) -> BinaryIO:
    """The file for reading; ModelError if there is none, or it is something else than a file."""
    try:
        # Not blocking: a pipe that nobody writes to would hold us here.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        raise ModelError(f"cannot read {path}: {error}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ModelError(f"cannot read {path}: it is not a regular file")
    return file


def read_text(path: Path, max_bytes: int) -> str:
    """A file of UTF-8 in a model's folder, of so many bytes at most."""
    with open_regular(path) as file:
        _check_place(path, Path(os.readlink(f"/proc/self/fd/{file.fileno()}")))
        try:
            data = file.read(max_bytes + 1)
            if len(data) > max_bytes:
                raise ModelError(f"cannot read {path}: it has more than {max_bytes} bytes")
            return data.decode()
        except (OSError, ValueError) as error:  # ValueError: not UTF-8
            raise ModelError(f"cannot read {path}: {error}") from None


def _check_place(path: Path, opened: Path) -> None:
    folder = path.parent.resolve()
    places = [folder]
    if folder.parent.name == "snapshots":  # of the hub's cache, beside its `blobs`
        places.append(folder.parent.parent / "blobs")
    if opened.parent not in places:
        raise ModelError(
            f"cannot read {path}: it is a link that leaves the model's folder, to {opened}; put"
            " a copy in its place if it is meant"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    text = read_text(path, MAX_JSON_BYTES)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise ModelError(f"cannot read {path}: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


class Fields:
    """Typed look-ups in a mapping that came from a file; what is wrong is named."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self.where = where
        self.prefix = prefix

    def get(self, name: str) -> Any:
        return self.values.get(self.prefix + name)

    def integer(self, name: str, default: int | None = None, most: int = MAX_TOKEN_ID) -> int:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self.wrong(name, f"a count up to {most}", value)
        return value

    def size(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        value = self.integer(name, default, most)
        if value < 1:
            raise self.wrong(name, "at least 1", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = default if self.get(name) is None else self.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if 0.0 < number < math.inf:
                return number
        raise self.wrong(name, "a finite number above 0", value)

    def token_ids(self, name: str) -> list[int]:
        """One token id or a list of them; none where nothing is said."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        good = all(
            isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= MAX_TOKEN_ID
            for one in ids[:MAX_END_TOKENS]
        )
        if len(ids) > MAX_END_TOKENS or not good:
            raise self.wrong(name, f"a token id or a list of up to {MAX_END_TOKENS}", value)
        return ids

    def wrong(self, name: str, expected: str, value: object) -> ModelError:
        if value is None:
            return ModelError(f"{self.where} does not say {self.prefix + name}")
        return ModelError(
            f"{self.where}: {self.prefix + name} is {shown(value)}, must be {expected}"
        )

    def require(self, name: str, value: object, supported: object) -> None:
        if value != supported:
            raise ModelError(
                f"{self.where}: {self.prefix + name} = {shown(value)} is not supported, "
                f"only {supported!r}"
            )
