"""The shape that a GGUF file's metadata and tensor table give: Llama and what is built like it."""

from array import array

from nodeserve.config import ModelConfig, RopeScaling
from nodeserve.config_readers.parts import MAX_LAYERS, checked, token_id
from nodeserve.errors import ModelError
from nodeserve.gguf import GgufFile, StringArray
from nodeserve.model_files import MAX_POSITION, MAX_TOKEN_ID, Fields
from nodeserve.types import shown

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
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


def gguf_config(file: GgufFile) -> ModelConfig:
    """The shape in a GGUF file's metadata and tensor table."""
    where = str(file.path)
    architecture = _architecture(file, where)
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
    return checked(
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
            bos_token_id=token_id(Fields(file.metadata, where, "tokenizer.ggml."), "bos_token_id"),
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


def _architecture(file: GgufFile, where: str) -> str:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{where}: architecture {shown(name)} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    return str(name)
