"""Writes data/tokenizer_*.json: what llama.cpp makes of the awkward strings.

    pip install xllamacpp && python -m tests.reference.make_tokenizer_data

Needed again only when the strings change; the results are committed. llama.cpp's server, started
on a loopback port, is asked with and without special tokens read from the text: for the embedded
model (byte-level), and for a small SentencePiece-like vocabulary that is trained here and carried
by a model of zeros, since the server loads no vocabulary alone.
"""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from nodeserve.checkpoint import resolve
from tests.fakes.gguf_writer import write_gguf
from tests.reference.awkward import awkward_strings
from tests.reference.sentencepiece import scored_metadata, train_pieces

DATA = Path(__file__).parent / "data"
HIDDEN = 32


def ask_llama_cpp(model: Path) -> list[dict[str, Any]]:
    import xllamacpp  # type: ignore[import-not-found]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
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

    return [
        {"text": text, "ids": tokenize(text, True), "plain_ids": tokenize(text, False)}
        for text in awkward_strings()
    ]


def model_of_zeros(path: Path, metadata: dict[str, Any]) -> Path:
    """The least llama that llama.cpp loads: one layer, every weight 0."""
    shape = {
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": HIDDEN,
        "llama.block_count": 1,
        "llama.attention.head_count": 1,
        "llama.context_length": 256,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    square, row = (HIDDEN, HIDDEN), (HIDDEN,)
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(metadata["tokenizer.ggml.tokens"]), HIDDEN),
        "output_norm.weight": row,
        "blk.0.attn_norm.weight": row,
        "blk.0.ffn_norm.weight": row,
    }
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{part}.weight"] = square
    zeros = {
        name: (dims, 0, bytes(4 * dims[0] * (dims[1] if len(dims) > 1 else 1)))
        for name, dims in tensors.items()
    }
    return write_gguf(path, {**metadata, **shape}, zeros)


def write(name: str, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One row of the data a line, so that a change shows as the lines that changed."""
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    start = json.dumps(head, separators=(",", ":"))[:-1] + ("," if head else "")
    (DATA / name).write_text(f'{start}"rows":[\n{lines}\n]}}\n')
    sys.stderr.write(f"{len(rows)} strings by llama.cpp in {name}\n")


def main() -> None:
    write("tokenizer_smollm2.json", {}, ask_llama_cpp(resolve().path))
    pieces = train_pieces(Path("LICENSE").read_text().splitlines() + awkward_strings())
    with tempfile.TemporaryDirectory() as folder:
        model = model_of_zeros(Path(folder) / "zeros.gguf", scored_metadata(pieces))
        write("tokenizer_sentencepiece.json", {"pieces": pieces}, ask_llama_cpp(model))


if __name__ == "__main__":
    main()
