"""One target under atheris, which keeps the inputs that reach something new.

    python -m tests.fuzz.guided TARGET FOLDER [libFuzzer's options]

Runs in the environment that tests/fuzz/tools.py makes. FOLDER gets the seeds and what was found.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nodeserve"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    target, folder, *options = sys.argv[1:]
    corpus = Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    chosen = TARGETS[target]
    for place, seed in enumerate(seeds := list(chosen.seeds())):
        (corpus / f"seed{place}").write_bytes(seed)
    # What a target imports when it first runs is guided too, and is not counted as an input's time.
    with atheris.instrument_imports(include=["nodeserve"], enable_loader_override=False):
        chosen.run(seeds[0])
    arguments = [sys.argv[0], str(corpus), f"-max_len={chosen.max_bytes}", *options]
    atheris.Setup(arguments, chosen.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
