"""One section in a process of its own: `python -m bench.gpu.section NAME SHEET [--rehearse]`.

What earlier sections found comes on the standard input as JSON.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

from bench.gpu.bed import Bed
from bench.gpu.lines import Sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="One section of gpu-check.")
    parser.add_argument("name")
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    known = json.load(sys.stdin)
    if options.rehearse:
        torch.set_num_threads(1)  # sections run side by side on whatever cores there are
    began_s = time.perf_counter()
    sheet = Sheet(options.sheet)
    section = importlib.import_module(f"bench.gpu.sections.{options.name}")
    section.run(Bed(sheet, known, options.rehearse))
    sheet.end()
    print(f"{options.name}: {time.perf_counter() - began_s:.1f} s")


if __name__ == "__main__":
    main()
