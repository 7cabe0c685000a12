"""Llama 3.1 8B and 70B and Qwen3 32B on A100, H100 and H200 GPUs of 80, 80 and 141 GB.

A pass is put together from published times of its kernels, and these terms fitted to it, for
prompts of 256 to 8192 tokens and for 1 to 256 decodes, up to 16 apart from more. Weights are of 8
bits where the name says fp8, keys and values of 16.

Hopper: aiconfigurator's linears, attention and all-reduces (ai-dynamo/aiconfigurator 095f58a5),
within 12 %: `python -m bench.hopper.fit` prints them. What kernels leave out (6, 15 and 19 us a
layer on 2, 4 and 8 GPUs, 18 % more on prefills) is from runs of vLLM with 70B on H100, none on
H200.

A100: Vidur's layers measured on it (microsoft/vidur 7d475133), with attention and all-reduces of
H100 by the GPUs' nominal ratios and the same us a layer, within 9 %: `python -m bench.ampere.fit`
prints them and how far they are off where they were not fitted.
"""

from typing import NamedTuple

from nodeserve.layout import Shape
from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.shapes import Alone
from nodeserve.policy.sizes import Anatomy

Terms = tuple[float, float, float]

LARGE_SEQS = 17  # linears of up to 16 rows are other kernels than those of more
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
    """Milliseconds. Prefill: 1, tokens, squared tokens; decode: 1, tokens of context, sequences,
    below LARGE_SEQS of these and from there on."""

    prefill: Terms
    small: Terms
    large: Terms


class Model(NamedTuple):
    num_layers: int
    weight_bytes: float
    kv_bytes_per_token: int
    hidden_size: int
    vocab_size: int

    @property
    def anatomy(self) -> Anatomy:
        """All have 8 KV heads, activations and an embedding and a head of 16 bits."""
        edge_bytes = 2 * 2 * self.vocab_size * self.hidden_size
        return Anatomy(self.num_layers, 8, 2 * self.hidden_size, self.weight_bytes, edge_bytes)


AICONFIGURATOR = "aiconfigurator's kernel times, put together and fitted"
GPUS = {
    "a100": Gpu(80e9, 163e9, "Vidur's layer times and aiconfigurator's, put together and fitted"),
    "h100": Gpu(80e9, 245e9, AICONFIGURATOR),
    "h200": Gpu(141e9, 245e9, AICONFIGURATOR),
}
MODELS = {
    "llama-3.1-8b-bf16": Model(32, 16.1e9, 131_072, 4096, 128_256),
    "llama-3.1-70b-bf16": Model(80, 141.2e9, 327_680, 8192, 128_256),
    # 8 bits but for the embedding and the head.
    "llama-3.1-70b-fp8": Model(80, 72.7e9, 327_680, 8192, 128_256),
    "qwen3-32b-bf16": Model(64, 65.5e9, 262_144, 5120, 151_936),
}
# By model and GPU, then by tensor parallel degree.
FITS = {
    "llama-3.1-8b-bf16-a100": {
        1: Fit(
            (3.203, 0.07056, 8.469e-07), (10.81, 7.272e-05, 0.03457), (10.49, 7.265e-05, 0.04132)
        ),
        2: Fit(
            (4.783, 0.03726, 8.538e-07), (7.207, 3.629e-05, 0.02236), (6.181, 3.631e-05, 0.0307)
        ),
        4: Fit(
            (6.007, 0.02147, 5.712e-07), (5.06, 1.803e-05, 0.01058), (4.731, 1.799e-05, 0.02174)
        ),
        8: Fit((4.971, 0.01313, 4.59e-07), (3.9, 9.029e-06, 0.05479), (4.187, 9.096e-06, 0.01345)),
    },
    "llama-3.1-70b-bf16-a100": {
        1: Fit((27.16, 0.6394, 3.312e-06), (92.09, 0.000182, 0.2091), (78.96, 0.0001798, 0.3667)),
        2: Fit((10.14, 0.3497, 1.37e-07), (48.98, 9.075e-05, 0.09077), (45.42, 9.095e-05, 0.1923)),
        4: Fit((15.39, 0.1877, 6.584e-08), (28.99, 4.524e-05, 0.1295), (26.7, 4.52e-05, 0.1258)),
        8: Fit((16.31, 0.1053, 4.824e-07), (18.71, 2.243e-05, 0.1189), (17.69, 2.209e-05, 0.08328)),
    },
    "llama-3.1-8b-bf16-h100": {
        1: Fit(
            (3.258, 0.01744, 1.206e-06), (5.847, 4.413e-05, 0.01735), (5.741, 4.435e-05, 0.006794)
        ),
        2: Fit(
            (2.993, 0.01241, 6.362e-07), (4.102, 2.201e-05, 0.01075), (4.035, 2.209e-05, 0.005968)
        ),
        4: Fit(
            (3.185, 0.009491, 4.539e-07), (3.383, 1.101e-05, 0.008701), (3.568, 1.1e-05, 0.005415)
        ),
        8: Fit(
            (3.281, 0.008092, 4.508e-07), (3.224, 5.466e-06, 0.01341), (3.508, 5.496e-06, 0.004332)
        ),
    },
    "llama-3.1-8b-bf16-h200": {
        1: Fit((1.819, 0.01929, 9.659e-07), (4.63, 3.1e-05, 0), (4.24, 3.131e-05, 0.008717)),
        2: Fit(
            (2.076, 0.01347, 4.579e-07), (3.404, 1.579e-05, 0.001174), (3.21, 1.57e-05, 0.007146)
        ),
        4: Fit(
            (2.553, 0.01017, 2.635e-07), (2.959, 7.919e-06, 0.005249), (2.999, 7.876e-06, 0.006014)
        ),
        8: Fit(
            (2.721, 0.008557, 2.716e-07), (2.868, 4.006e-06, 0.01328), (3.045, 4.005e-06, 0.004733)
        ),
    },
    "llama-3.1-70b-fp8-h100": {
        1: Fit((0, 0.1294, 1.787e-06), (27.93, 0.00011, 0.1299), (27.29, 0.000111, 0.009514)),
        2: Fit((3.313, 0.08336, 0), (16.6, 5.517e-05, 0.05807), (16.26, 5.525e-05, 0.02283)),
        4: Fit((8.268, 0.05171, 0), (11.27, 2.749e-05, 0.03298), (11.62, 2.75e-05, 0.02738)),
        8: Fit((7.684, 0.03616, 0), (8.774, 1.36e-05, 0.0594), (9.121, 1.36e-05, 0.02153)),
    },
    "llama-3.1-70b-fp8-h200": {
        1: Fit((0, 0.1108, 4.48e-06), (21.46, 7.598e-05, 0), (21.95, 8.064e-05, 0.005614)),
        2: Fit((2.97, 0.07588, 7.688e-07), (13.5, 3.926e-05, 0), (13.75, 4.027e-05, 0.021)),
        4: Fit(
            (8.414, 0.04776, 3.637e-07), (9.793, 2.018e-05, 0.01261), (10.3, 2.012e-05, 0.02788)
        ),
        8: Fit(
            (7.604, 0.03347, 9.914e-08), (7.863, 1.005e-05, 0.0505), (8.495, 9.993e-06, 0.02021)
        ),
    },
    "qwen3-32b-bf16-h100": {
        1: Fit(
            (8.981, 0.07689, 5.821e-06), (22.48, 8.722e-05, 0.05255), (22.19, 8.948e-05, 0.02292)
        ),
        2: Fit(
            (6.993, 0.04649, 2.295e-06), (13.32, 4.405e-05, 0.03414), (13.42, 4.434e-05, 0.01545)
        ),
        4: Fit(
            (7.263, 0.02883, 1.297e-06), (8.987, 2.195e-05, 0.02476), (9.377, 2.196e-05, 0.01343)
        ),
        8: Fit(
            (6.874, 0.02045, 8.625e-07), (7.117, 1.092e-05, 0.03845), (7.784, 1.095e-05, 0.01031)
        ),
    },
    "qwen3-32b-bf16-h200": {
        1: Fit((5.539, 0.08171, 5.051e-06), (17.79, 5.891e-05, 0), (14.89, 6.441e-05, 0.03456)),
        2: Fit((5, 0.04864, 2.004e-06), (10.8, 3.174e-05, 0), (10.02, 3.218e-05, 0.0211)),
        4: Fit((5.444, 0.03079, 9.173e-07), (7.417, 1.615e-05, 0.02239), (7.541, 1.6e-05, 0.01561)),
        8: Fit((5.513, 0.0216, 5.075e-07), (6.242, 8.022e-06, 0.0304), (6.619, 7.978e-06, 0.01122)),
    },
}


def kernel_family(name: str) -> Family:
    """`name` is a key of FITS. In every shape whose memory holds the model and two requests of full
    length for each stage. Tensor parallel degrees are those of FITS; what stages send each other is
    added by formula (shapes.py)."""
    model, _, kind = name.rpartition("-")
    size, gpu = MODELS[model], GPUS[kind]
    shapes = {
        (tp, pp): _profile(name, size, gpu, fit, tp, pp, num_tokens)
        for tp, fit in FITS[name].items()
        for pp in STAGES
        if (num_tokens := _num_tokens(size.anatomy, size, gpu, Shape(tp, pp)))
        >= 2 * pp * MAX_MODEL_LEN
    }
    return Family(name, gpu.kernels, shapes)


def _num_tokens(anatomy: Anatomy, size: Model, gpu: Gpu, shape: Shape) -> int:
    room = USED * gpu.num_bytes - anatomy.worker_weight_bytes(shape)
    return int(room / (size.kv_bytes_per_token * anatomy.worker_kv_share(shape)))


def _profile(
    name: str, size: Model, gpu: Gpu, fit: Fit, tp: int, pp: int, num_tokens: int
) -> Profile:
    return Profile(
        name,
        f"kernel times of tp{tp}, in {pp} stages; handoff: two GPUs' all-gather; noise assumed",
        _staged(_cost(fit, fit.small, _cost(fit, fit.large, None)), size, gpu, pp),
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


def _staged(cost: StepCost, size: Model, gpu: Gpu, pp: int) -> StepCost:
    whole = Alone(size.anatomy, cost, 0, size.kv_bytes_per_token, gpu.nvlink_bytes_per_s)
    return whole.cost_in(Shape(pp=pp))


def _cost(fit: Fit, decode: Terms, large: StepCost | None) -> StepCost:
    return StepCost(
        prefill_fix_s=1e-3 * fit.prefill[0],
        decode_fix_s=1e-3 * decode[0],
        token_s=1e-3 * fit.prefill[1],
        attention_s=1e-3 * 2 * fit.prefill[2],  # the fit counts len^2, this half of it
        decode_seq_s=1e-3 * decode[2],
        kv_token_s=1e-3 * decode[1],
        large=large,
        large_seqs=LARGE_SEQS if large else 0,
    )
