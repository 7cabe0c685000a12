"""DeepSeek-V3 on H100 and H200 GPUs, attention for each rank alone, experts spread over all ranks.

Sizes and operations are counted from the model's shape. Passes are set to what SGLang's team
published (lmsys.org, 5 May 2025, a node being eight H100): prefill of 4,096-token prompts over 32
ranks at 50,302 tokens/s a node; decodes behind 2,000 tokens over 72 ranks at 22,300, taken as 256
sequences on each. tests/unit/test_deepseek_profile.py holds the passes to these and to their 52,300
for prompts of 2,000. What is assumed beside them stands at each constant.

Keys and values are latents of 16 bits, matrices of 8. A rank's own products and those of the
experts, which all ranks share, split a token's time as their operations do.
"""

from nodeserve.config import MlaConfig, ModelConfig, MoeConfig
from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.sizes import anatomy_of

GPUS = {"h100": 80e9, "h200": 141e9}  # bytes of memory
RANKS = (8, 16, 32, 64, 72, 144)
USED = 0.9  # of the memory; assumed
BUFFERS_BYTES = 8e9  # of activations and of the exchange; assumed
READ_BYTES_PER_S = {"h100": 2.7e12, "h200": 3.9e12}  # of the memory, four fifths of what it has
ATTENTION_FLOPS_PER_S = 400e12  # of prefill attention; assumed
PREFILL_EXCHANGE_S = 0.5e-3  # latency of a layer's two exchanges; assumed
DECODE_EXCHANGE_S = 0.49e-3  # of a small batch: DeepEP's two kernels over 64 ranks
NIC_BYTES_PER_S = 50e9  # of each GPU
TOKEN_S = 1.285e-4  # of a token in a full prefill pass, without attention over pairs and latencies
DECODE_SEQ_S = 8.0e-5  # of a sequence, without its context and its share of the experts
NOISE = 0.03  # assumed
MAX_MODEL_LEN = 32_768

V3 = ModelConfig(
    architecture="deepseek_v3",
    vocab_size=129_280,
    hidden_size=7168,
    intermediate_size=18_432,
    num_layers=61,
    num_heads=128,
    num_kv_heads=1,
    head_dim=192,
    max_position=163_840,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    mla=MlaConfig(512, 1536, 128, 64, 128, softmax_scale=192**-0.5),
    moe=MoeConfig(
        256, 8, 2048, 2048, scoring="sigmoid", num_groups=8, num_active_groups=4,
        group_score="top2", dense_layers=(0, 1, 2),
    ),
)  # fmt: skip


def deepseek_family(gpu: str) -> Family:
    """With each number of ranks whose memory holds the model and two requests of full length."""
    name = f"deepseek-v3-fp8-{gpu}"
    spread = {
        ranks: _profile(name, gpu, ranks, num_tokens)
        for ranks in RANKS
        if (num_tokens := _num_tokens(gpu, ranks)) >= 2 * MAX_MODEL_LEN
    }
    return Family(name, "counted from the model, set to SGLang's published rates", {}, spread)


def _kv_bytes() -> int:
    return V3.kv_bytes_per_token(2)


def _weight_bytes(ranks: int) -> float:
    return anatomy_of(V3, value_bytes=1).worker_weight_bytes(Shape(ep=ranks))


def _num_tokens(gpu: str, ranks: int) -> int:
    free = USED * GPUS[gpu] - BUFFERS_BYTES - _weight_bytes(ranks)
    return int(free / _kv_bytes())


def _profile(name: str, gpu: str, ranks: int, num_tokens: int) -> Profile:
    return Profile(
        name,
        f"one of {ranks} ranks: counted from the model, set to SGLang's rates; noise assumed",
        _cost(gpu, ranks),
        noise=NOISE,
        num_kv_tokens=num_tokens,
        kv_bytes_per_token=_kv_bytes(),
        handoff_bytes_per_s=NIC_BYTES_PER_S,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=MAX_MODEL_LEN,
    )


def _cost(gpu: str, ranks: int) -> StepCost:
    weights_s = _weight_bytes(ranks) / READ_BYTES_PER_S[gpu]
    sparse = sum(map(V3.is_sparse, range(V3.num_layers)))
    expert_s = TOKEN_S * _routed_share()
    return StepCost(
        prefill_fix_s=weights_s + sparse * PREFILL_EXCHANGE_S,
        decode_fix_s=weights_s + sparse * DECODE_EXCHANGE_S,
        token_s=TOKEN_S - expert_s,
        attention_s=_flops_per_pair() / ATTENTION_FLOPS_PER_S,
        decode_seq_s=DECODE_SEQ_S,
        kv_token_s=_kv_bytes() / READ_BYTES_PER_S[gpu],
        expert_token_s=expert_s,
    )


def _routed_share() -> float:
    """Of the operations of a token's pass, those in the experts that a router chose."""
    assert V3.moe is not None
    routed = V3.num_routed_weights * V3.moe.num_active / V3.moe.num_experts
    return routed / (V3.num_active_weights - V3.vocab_size * V3.hidden_size)


def _flops_per_pair() -> int:
    """Operations of prefill attention, with keys and values made of the latents."""
    assert V3.mla is not None
    return 2 * V3.num_layers * V3.num_heads * (V3.head_dim + V3.mla.v_head_dim)
