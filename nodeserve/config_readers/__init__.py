"""What a model's files say of its shape: a reader for each family, found by `model_type`.

A reader gets the fields of config.json and the folder that it lies in, and refuses by name what
the model code does not do. No torch: the coordinator reads this too. The code that computes with
what was read is in `nodeserve.model.families`.
"""

from collections.abc import Callable
from pathlib import Path

from nodeserve.config import ModelConfig
from nodeserve.config_readers import deepseek, foreign, llama, moe, opt
from nodeserve.errors import ModelError
from nodeserve.model_files import Fields, read_json
from nodeserve.types import shown

Reader = Callable[[Fields, Path], ModelConfig]

READERS: dict[str, Reader] = {
    "llama": llama.read,
    "mistral": llama.read,
    "qwen2": llama.read,
    "qwen3": llama.read,
    "mixtral": moe.read_mixtral,
    "qwen2_moe": moe.read_qwen,
    "qwen3_moe": moe.read_qwen,
    "opt": opt.read,
    "deepseek_v2": deepseek.read,
    "deepseek_v3": deepseek.read,
}


MODEL_IMPLS = ("auto", "nodeserve", "transformers")  # whose code computes a model


def folder_config(folder: Path, model_impl: str = "auto") -> ModelConfig:
    """The shape in a folder's config.json, with the end tokens of generation_config.json.

    What is no family of ours is read for transformers' code, unless `model_impl` says otherwise.
    """
    path = folder / "config.json"
    fields = Fields(read_json(path), str(path))
    name = fields.get("model_type")
    known = isinstance(name, str) and name in READERS
    if known and model_impl != "transformers":
        return READERS[str(name)](fields, folder)
    if model_impl != "nodeserve" and foreign.is_decoder(fields):
        return foreign.read(fields, folder)
    raise ModelError(
        f"{path}: architecture {shown(name)} is not supported, only {', '.join(READERS)}"
        + ("" if model_impl == "nodeserve" else ", or a decoder that transformers has code for")
    )
