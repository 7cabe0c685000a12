"""What the assembler made of a kernel: registers, stack, and where local memory is touched.

A value that found no register lies in local memory. To put it there once costs nothing to speak of;
in a loop it costs with every tile. So the machine code itself is read, not only the stack's size.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import triton

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
LABEL = re.compile(r"\s*([.$\w]+):")
TARGET = re.compile(r"`\(([.$\w]+)\)")
LOCAL = re.compile(r"(LDL|STL)\b")  # loads from local memory, and stores to it
PRODUCT = re.compile(r"(HMMA|HGMMA|UTCHMMA|FFMA)\b")  # of sm_80, sm_90, sm_100; of float32


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: not 0 where registers were spilled."""
    text = _told(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    told = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {"registers": told["REG"], "stack": told["STACK"]}


def disassembled(cubin: bytes) -> str:
    """Machine code, an instruction a line, with labels where branches go."""
    return _told(triton.knobs.nvidia.nvdisasm.path, "--print-code", cubin)


def _told(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True, slots=True)
class Flow:
    """A kernel's instructions, and which may follow which."""

    instructions: list[str]
    followers: list[list[int]]
    called: list[int]  # first instructions of functions; far branches are calls of plain labels

    @classmethod
    def of(cls, listing: str) -> "Flow":
        """From what `disassembled` gives. Raises ValueError at a jump whose target is not named."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in listing.splitlines():
            if match := INSTRUCTION.match(line):
                instructions.append(match[1])
            elif match := LABEL.match(line):
                labels[match[1]] = len(instructions)
        followers, called = [], []
        for place, text in enumerate(instructions):
            guard, operation, target = _parts(text)
            if operation == "CALL" and not target.startswith("."):
                called.append(labels[target])
            ends = operation in ("EXIT", "RET") or (operation == "BRA" and "," not in text)
            after = [] if ends and not guard else [place + 1]
            after += [labels[target]] if operation in ("BRA", "CALL") else []
            followers.append([one for one in after if one < len(instructions)])
        return cls(instructions, followers, called)

    def reached(self, starts: Iterable[int]) -> set[int]:
        """The instructions that may run from `starts` on, those included."""
        seen, waiting = set(starts), list(starts)
        while waiting:
            found = [one for one in self.followers[waiting.pop()] if one not in seen]
            seen.update(found)
            waiting += found
        return seen

    def repeated(self, operation: re.Pattern[str]) -> list[str]:
        """Instructions of a kind that may run again and again: those on a way back to themselves,
        and those of functions, which a loop may call."""
        in_functions = self.reached(self.called)
        return [
            text
            for place, text in enumerate(self.instructions)
            if operation.match(_parts(text)[1])
            and (place in in_functions or place in self.reached(self.followers[place]))
        ]


def _parts(text: str) -> tuple[str, str, str]:
    """An instruction's condition, its name without options, and the label it names; "" for none."""
    guard, rest = text.split(None, 1) if text.startswith("@") else ("", text)
    operation = rest.split()[0].split(".")[0]
    target = TARGET.search(rest)
    if operation in ("BRX", "JMX", "JMP") or (operation in ("BRA", "CALL") and not target):
        raise ValueError(f"cannot follow {text!r}: read where it goes, and teach `Flow` that")
    return guard, operation, target[1] if target else ""
