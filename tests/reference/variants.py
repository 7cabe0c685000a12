"""A tiny random checkpoint of every family and variant that instances of several workers run."""

from dataclasses import replace
from pathlib import Path

from nodeserve.checkpoint import Checkpoint
from tests.reference import deepseek, hub
from tests.reference.tiny_models import FAMILIES, reference, written

DENSE = {
    **{name: FAMILIES[name] for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3")},
    # Windows that begin in the second stage; heads that do not divide, as SmolLM2's.
    "windowed": replace(FAMILIES["mistral"], first_window_layer=2, num_heads=9),
    # The last of four tensor ranks have no words.
    "few-words": replace(FAMILIES["llama-tied"], vocab_size=67),
}
OPTS = ("opt", "opt-post-norm", "opt-bare")
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")
LATENTS = ("v2-lite", "v2", "v3")


def checkpoints(folder: Path) -> dict[str, Checkpoint]:
    """All of them, by name, written into `folder`."""
    found = {
        name: written(reference(config), config, folder / name) for name, config in DENSE.items()
    }
    for name in (*EXPERTS, *OPTS):
        hub.write(name, folder / name)
        found[name] = hub.checkpoint_in(folder / name)
    for name in LATENTS:
        found[name] = deepseek.saved(deepseek.reference(name), folder / name)
    return found
