"""Writes data/tokenizer_smollm2.json: what llama.cpp makes of the awkward strings.

    pip install xllamacpp && python -m tests.reference.make_tokenizer_data

Needed again only when the strings change; the result is committed. llama.cpp's server, started
on a loopback port, is asked with and without special tokens read from the text.
"""

import json
import sys
import urllib.request
from pathlib import Path

from nodeserve.checkpoint import resolve
from tests.reference.awkward import awkward_strings

DATA = Path(__file__).parent / "data" / "tokenizer_smollm2.json"


def main() -> None:
    import xllamacpp  # type: ignore[import-not-found]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(resolve().path)
    parameters.n_ctx = 256
    parameters.warmup = False
    server = xllamacpp.Server(parameters)

    def tokenize(text: str, parse_special: bool) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": parse_special}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            ids: list[int] = json.load(reply)["tokens"]
        return ids

    rows = [
        {"text": text, "ids": tokenize(text, True), "plain_ids": tokenize(text, False)}
        for text in awkward_strings()
    ]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    DATA.write_text(f"[\n{lines}\n]\n")
    sys.stderr.write(f"{len(rows)} strings by llama.cpp in {DATA}\n")


if __name__ == "__main__":
    main()
