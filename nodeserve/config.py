"""Settings: frozen, built once, resolved once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; `kind` says which of the other fields count.

    "linear" divides every frequency by `factor`; "llama3" follows Llama 3.1's rule, from `factor`
    and the three numbers below it; "factors" divides frequency i by `frequency_factors[i]`, of
    which there are head_dim / 2 (GGUF files carry the result of the rule, not its numbers).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder looks like, whatever file format said so. Read without torch."""

    architecture: str  # "llama", "mistral", "qwen2" or "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # biases on the q, k and v projections
    qk_norm: bool = False  # RMS norm over head_dim on q and k, before the rotation
    sliding_window: int | None = None  # tokens a query sees, itself included; None: all
    first_window_layer: int = 0  # layers before this one see all tokens even with a window
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * dtype_bytes
