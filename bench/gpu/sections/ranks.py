"""Instances of two workers on one GPU: tensor ranks, stages and ranks that share experts.

NCCL refuses two ranks on one GPU, so what they tell each other goes by way of the host
(`model/group_host.py`): this shows that teams plan, follow and choose alike on a GPU, and nothing
of NCCL. Float32, and each answer against transformers as in the section `tokens`.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu.bed import Bed
from bench.gpu.checkpoints import Reference, write_checkpoint, write_tokenizer
from bench.gpu.sections.tokens import FLOAT32_TOLERANCE, Tokens, compared
from bench.gpu.serving import all_tokens, served
from nodeserve.layout import parse_layout
from tests.reference import deepseek, hub

NUM_TOKENS = 24
LENGTHS = (3, 16, 17, 40, 90)  # some longer than a step


@dataclass(frozen=True, slots=True)
class Model:
    """A tiny model with random weights, and the shapes that it is served in."""

    name: str
    folder: Path
    vocab_size: int
    layouts: tuple[str, ...]


def run(bed: Bed) -> None:
    bed.hurry()
    with tempfile.TemporaryDirectory(prefix="nodeserve-ranks-") as name:
        for model in models(bed, Path(name)):
            check_shapes(bed, Path(name), model)


def models(bed: Bed, work: Path) -> list[Model]:
    """Keys and values of each head, experts in every layer, latents."""
    llama, mixtral, v3 = (work / name for name in ("llama", "mixtral", "v3"))
    write_checkpoint(bed.small, llama)
    hub.write("mixtral", mixtral)
    deepseek.saved(deepseek.reference("v3"), v3)
    sizes = [hub.SHAPE["vocab_size"], deepseek.COMMON["vocab_size"]]
    for folder, size in zip((mixtral, v3), sizes, strict=True):
        write_tokenizer(size, folder)
    teams = ("1m:tp2", "1m:pp2", "1p:tp2,1d:tp2")
    return [
        Model("Llama", llama, bed.small.vocab_size, bed.pick(teams, ("1p:pp2,1d:tp2",))),
        Model("Mixtral", mixtral, sizes[0], ("1m:ep2",)),
        Model("DeepSeek-V3", v3, sizes[1], ("1m:tp2",)),
    ]


def check_shapes(bed: Bed, work: Path, model: Model) -> None:
    prompts = prompts_for(model.vocab_size)

    def answers(layout: str) -> Tokens:
        gpus = ",".join("0" * parse_layout(layout).num_workers)
        name = f"{model.name}-{layout.replace(':', '-').replace(',', '-')}"
        settings = {
            "model": model.folder,
            "device": "cuda",
            "layout": layout,
            "gpus": gpus,
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "kv_memory": bed.pick("256MiB", "4MiB"),
        }
        with served(bed, work, name, **settings) as node:
            return all_tokens(node.socket, prompts, NUM_TOKENS)

    with ThreadPoolExecutor(len(model.layouts)) as pool:
        found = list(pool.map(answers, model.layouts))
    reference = Reference(model.folder, torch.float32, bed.device)
    for layout, tokens in zip(model.layouts, found, strict=True):
        name = f"{model.name}, {layout} on one GPU, gives the tokens of transformers"
        bed.sheet.add(
            compared(
                name,
                prompts,
                tokens,
                lambda prompt, answer: (reference.logits(prompt, answer), FLOAT32_TOLERANCE),
            )
        )


def prompts_for(vocab_size: int) -> Tokens:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(1, vocab_size, (n,), generator=draw).tolist() for n in LENGTHS]
