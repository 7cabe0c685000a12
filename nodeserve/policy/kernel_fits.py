"""Llama 3.1 8B and 70B and Qwen3 32B on A100, H100 and H200 GPUs of 80, 80 and 141 GB.

A pass is put together from published times of its kernels, and these terms fitted to it, for
prompts of 256 to 8192 tokens and for 1 to 256 decodes. Weights are of 8 bits where the name says
fp8, keys and values of 16.

Hopper: aiconfigurator's linears, attention and all-reduces (ai-dynamo/aiconfigurator 095f58a5),
within 11 %: `python -m bench.hopper.fit` prints them. What kernels leave out (6, 15 and 19 us a
layer on 2, 4 and 8 GPUs, 18 % more on prefills) is from runs of vLLM with 70B on H100, none on
H200.

A100: Vidur's layers measured on it (microsoft/vidur 7d475133), with attention and all-reduces of
H100 by the GPUs' nominal ratios and the same us a layer, within 9 % (70B on one GPU, in stages:
14 %): `python -m bench.ampere.fit` prints them and how far they are off where they were not fitted.
"""

from typing import NamedTuple

from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile

Terms = tuple[float, float, float]

USED = 0.9  # of them, for weights and keys and values
STAGES = (1, 2, 4)
NOISE = 0.02  # assumed
MAX_MODEL_LEN = 16_384


class Gpu(NamedTuple):
    """`nvlink_bytes_per_s`: two GPUs' all-gather on H100, measured; A100's is that by the links'
    nominal ratio."""

    num_bytes: float
    nvlink_bytes_per_s: float
    kernels: str  # where the times of a pass are from


class Fit(NamedTuple):
    """Milliseconds. Prefill: 1, tokens, squared tokens; decode: 1, tokens of context, sequences."""

    prefill: Terms
    decode: Terms


class Model(NamedTuple):
    num_layers: int
    weight_bytes: float
    kv_bytes_per_token: int


AICONFIGURATOR = "aiconfigurator's kernel times, put together and fitted"
GPUS = {
    "a100": Gpu(80e9, 163e9, "Vidur's layer times and aiconfigurator's, put together and fitted"),
    "h100": Gpu(80e9, 245e9, AICONFIGURATOR),
    "h200": Gpu(141e9, 245e9, AICONFIGURATOR),
}
MODELS = {
    "llama-3.1-8b-bf16": Model(32, 16.1e9, 131_072),
    "llama-3.1-70b-bf16": Model(80, 141.2e9, 327_680),
    "llama-3.1-70b-fp8": Model(80, 72.7e9, 327_680),  # 8 bits but for the embedding and the head
    "qwen3-32b-bf16": Model(64, 65.5e9, 262_144),
}
# By model and GPU, then by tensor parallel degree.
FITS = {
    "llama-3.1-8b-bf16-a100": {
        1: Fit((3.203, 0.07056, 8.469e-07), (10.75, 7.239e-05, 0.03942)),
        2: Fit((4.783, 0.03726, 8.538e-07), (7.055, 3.553e-05, 0.02416)),
        4: Fit((6.007, 0.02147, 5.712e-07), (4.982, 1.77e-05, 0.0199)),
        8: Fit((4.971, 0.01313, 4.59e-07), (4.089, 9.493e-06, 0.01409)),
    },
    "llama-3.1-70b-bf16-a100": {
        1: Fit((27.16, 0.6394, 3.312e-06), (89.64, 0.0001703, 0.289)),
        2: Fit((10.14, 0.3497, 1.37e-07), (48.05, 8.785e-05, 0.1742)),
        4: Fit((15.39, 0.1877, 6.584e-08), (28.68, 4.35e-05, 0.1119)),
        8: Fit((16.31, 0.1053, 4.824e-07), (18.75, 2.147e-05, 0.07584)),
    },
    "llama-3.1-8b-bf16-h100": {
        1: Fit((3.258, 0.01744, 1.206e-06), (5.882, 4.427e-05, 0.005923)),
        2: Fit((2.993, 0.01241, 6.362e-07), (4.145, 2.206e-05, 0.005262)),
        4: Fit((3.185, 0.009491, 4.539e-07), (3.423, 1.116e-05, 0.006299)),
        8: Fit((3.281, 0.008092, 4.508e-07), (3.303, 5.753e-06, 0.005513)),
    },
    "llama-3.1-8b-bf16-h200": {
        1: Fit((1.819, 0.01929, 9.659e-07), (4.52, 3.089e-05, 0.006748)),
        2: Fit((2.076, 0.01347, 4.579e-07), (3.342, 1.554e-05, 0.006257)),
        4: Fit((2.553, 0.01017, 2.635e-07), (2.959, 7.913e-06, 0.006259)),
        8: Fit((2.721, 0.008557, 2.716e-07), (2.933, 4.172e-06, 0.005383)),
    },
    "llama-3.1-70b-fp8-h100": {
        1: Fit((0, 0.1294, 1.787e-06), (28.15, 0.0001107, 0.004661)),
        2: Fit((3.313, 0.08336, 0), (16.65, 5.509e-05, 0.02049)),
        4: Fit((8.268, 0.05171, 0), (11.35, 2.78e-05, 0.02913)),
        8: Fit((7.684, 0.03616, 0), (8.999, 1.399e-05, 0.02225)),
    },
    "llama-3.1-70b-fp8-h200": {
        1: Fit((0, 0.1108, 4.48e-06), (21.79, 7.999e-05, 0.00648)),
        2: Fit((2.97, 0.07588, 7.688e-07), (13.51, 4.016e-05, 0.02243)),
        4: Fit((8.414, 0.04776, 3.637e-07), (9.769, 2.045e-05, 0.03131)),
        8: Fit((7.604, 0.03347, 9.914e-08), (8.048, 1.062e-05, 0.02297)),
    },
    "qwen3-32b-bf16-h100": {
        1: Fit((8.981, 0.07689, 5.821e-06), (22.77, 8.885e-05, 0.01974)),
        2: Fit((6.993, 0.04649, 2.295e-06), (13.42, 4.443e-05, 0.01547)),
        4: Fit((7.263, 0.02883, 1.297e-06), (9.142, 2.23e-05, 0.01482)),
        8: Fit((6.874, 0.02045, 8.625e-07), (7.346, 1.158e-05, 0.01282)),
    },
    "qwen3-32b-bf16-h200": {
        1: Fit((5.539, 0.08171, 5.051e-06), (16.97, 6.114e-05, 0.02071)),
        2: Fit((5, 0.04864, 2.004e-06), (10.54, 3.143e-05, 0.01771)),
        4: Fit((5.444, 0.03079, 9.173e-07), (7.46, 1.615e-05, 0.01609)),
        8: Fit((5.513, 0.0216, 5.075e-07), (6.382, 8.344e-06, 0.0126)),
    },
}


def kernel_family(name: str) -> Family:
    """`name` is a key of FITS. In every shape whose memory holds the model and two requests of full
    length for each stage. Stages add nothing to a pass: what they send each other takes
    microseconds on NVLink."""
    model, _, kind = name.rpartition("-")
    size, gpu = MODELS[model], GPUS[kind]
    shapes = {
        (tp, pp): _profile(name, size, gpu, fit, tp, pp, num_tokens)
        for tp, fit in FITS[name].items()
        for pp in STAGES
        if (num_tokens := _num_tokens(size, gpu.num_bytes * tp * pp)) >= 2 * pp * MAX_MODEL_LEN
    }
    return Family(name, gpu.kernels, shapes)


def _num_tokens(size: Model, num_bytes: float) -> int:
    return int((USED * num_bytes - size.weight_bytes) / size.kv_bytes_per_token)


def _profile(
    name: str, size: Model, gpu: Gpu, fit: Fit, tp: int, pp: int, num_tokens: int
) -> Profile:
    prefill, decode = fit
    return Profile(
        name,
        f"kernel times of tp{tp}, in {pp} stages; handoff: two GPUs' all-gather; noise assumed",
        StepCost(
            prefill_fix_s=1e-3 * prefill[0],
            decode_fix_s=1e-3 * decode[0],
            token_s=1e-3 * prefill[1],
            attention_s=1e-3 * 2 * prefill[2],  # the fit counts len^2, this half of it
            decode_seq_s=1e-3 * decode[2],
            kv_token_s=1e-3 * decode[1],
        ),
        noise=NOISE,
        num_kv_tokens=num_tokens,
        kv_bytes_per_token=size.kv_bytes_per_token,
        handoff_bytes_per_s=tp * pp * gpu.nvlink_bytes_per_s,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=MAX_MODEL_LEN,
        num_stages=pp,
        num_gpus=tp * pp,
    )
