"""OPT on A100 GPUs of 80 GB, as DistServe measured it (LLMServe/DistServe 82831f16 and before).

Two engines: theirs, and the vLLM 0.2 that they compare with. A pass takes what fits of theirs say,
one for each tensor parallel degree; vLLM's are those that they corrected by hand to what it did
when it served (prefill times 1.4, decode times 1.2). Their own engine's are the fits published with
the paper, without the later 1.1 on prefill: messages take time here, in their simulator they do
not. Its rules for the rest hold here too: of s pipeline stages each takes s milliseconds more in
prefill, and a pass of their engine 2 ms and 1e-4 ms for each token of context to be launched.

Of 175B they have linear fits of single stages (early-2024-04-19, TP 1 to 4), taken here times the
number of stages. Eight GPUs were fitted with negative slopes, so TP 8 is TP 4 scaled as 66B goes
from 4 to 8 GPUs: the weakest numbers here.
"""

from typing import NamedTuple

from nodeserve.policy.cost import StepCost
from nodeserve.policy.profile import Family, Profile

Terms = tuple[float, float, float]

NVLINK_BYTES_PER_S = 300e9  # nominal, of each GPU in one direction
LARGE_SEQS = 95
NOISE = 0.02  # assumed
STAGES = (1, 2, 3, 4, 8)
MAX_MODEL_LEN = 2048


class Model(NamedTuple):
    """What memory holds is gpu_tokens * GPUs - weight_tokens: within 0.1 % of their table."""

    num_layers: int
    kv_bytes_per_token: int
    gpu_tokens: int
    weight_tokens: int


class Fit(NamedTuple):
    """Milliseconds. Prefill: 1, tokens, sum of squared lengths; decode: 1, tokens of context,
    sequences, below LARGE_SEQS sequences and from there on."""

    prefill: Terms
    small: Terms
    large: Terms


class Engine(NamedTuple):
    """`launch` is what starting a pass adds: milliseconds, and for each token of context."""

    prefill_factor: float
    decode_factor: float
    launch: tuple[float, float]
    fits: dict[str, dict[int, Fit]]  # by model and tensor parallel degree, with the factors


MODELS = {
    "opt-13b": Model(40, 819_200, 96_864, 30_720),
    "opt-66b": Model(64, 2_359_296, 33_456, 55_312),
    "opt-175b": Model(96, 4_718_592, 16_664, 73_776),
}
ENGINES = {
    "distserve": Engine(
        1.0,
        1.0,
        (2.0, 1e-4),
        {
            "opt-13b": {
                1: Fit(
                    (16.4569, 0.0926475, 6.47479e-06),
                    (19.9347, 0.000626936, 0.038507),
                    (7.16619, 0.0005798, 0.158311),
                ),
                2: Fit(
                    (13.4027, 0.0623429, 2.22688e-06),
                    (13.2948, 0.000341092, 0.0629639),
                    (10.6387, 0.000311834, 0.0856291),
                ),
                4: Fit(
                    (10.9657, 0.0346195, 4.75114e-07),
                    (10.2562, 0.000187867, 0.0326927),
                    (10.4835, 0.000171209, 0.0456665),
                ),
            },
            "opt-66b": {
                2: Fit(
                    (39.1444, 0.249299, 2.04346e-05),
                    (48.288, 0.000942434, 0.12755),
                    (28.7277, 0.000474485, 0.296178),
                ),
                3: Fit(
                    (29.9984, 0.177893, 1.10957e-05),
                    (35.8015, 0.0005845, 0.095267),
                    (22.6539, 0.000535849, 0.208514),
                ),
                4: Fit(
                    (26.7651, 0.137593, 7.56132e-06),
                    (30.7603, 0.000451948, 0.0632842),
                    (27.4708, 0.000404685, 0.124807),
                ),
                8: Fit(
                    (23.1733, 0.0969016, 3.08277e-06),
                    (23.1551, 0.000226915, 0.0480064),
                    (21.7177, 0.000375809, 0.0897861),
                ),
            },
        },
    ),
    "vllm": Engine(
        1.4,
        1.2,
        (0.0, 0.0),
        {
            "opt-13b": {
                1: Fit(
                    (22.0522, 0.140509, 8.07658e-06),
                    (23.475, 0.000592934, 0.0607269),
                    (20.2064, 0.000490773, 0.120003),
                ),
                2: Fit(
                    (27.4408, 0.0905453, 8.45205e-06),
                    (24.5406, 0.000224401, 0.0871579),
                    (17.9478, 0.000457085, 0.111791),
                ),
                4: Fit(
                    (30.5363, 0.0515064, 4.23247e-07),
                    (25.9011, 7.75363e-05, 0.0552809),
                    (23.8839, 0.000284002, 0.0627652),
                ),
            },
            "opt-66b": {
                2: Fit(
                    (58.3822, 0.382641, -7.11415e-06),
                    (57.0734, 0.00364611, 0.224937),
                    (26.9838, 0.00620013, 0.448257),
                ),
                3: Fit(
                    (45.7445, 0.277813, 3.64625e-05),
                    (44.9396, 0.000809615, 0.21288),
                    (43.696, 0.000840257, 0.240065),
                ),
                4: Fit(
                    (42.9655, 0.212866, 4.60102e-05),
                    (39.5818, 0.000694572, 0.135809),
                    (40.8597, 0.000426487, 0.195084),
                ),
                8: Fit(
                    (38.9312, 0.157368, 4.53168e-06),
                    (31.176, 0.000275565, 0.067977),
                    (29.0878, 0.000602772, 0.138961),
                ),
            },
        },
    ),
}
# By tensor parallel degree: stages fitted, then of one stage prefill (1, tokens) and decode (1,
# context, sequences). What a prefill adds for each sequence, 0.03 ms at most, is left out.
STAGE_FITS_175B = {
    1: (8, (10.6558, 0.166637), (26.6432, 4.44793e-4, 0.0732520)),
    2: (4, (16.9879, 0.181405), (29.6836, 4.05706e-4, 0.0367496)),
    3: (3, (22.4602, 0.163037), (27.3981, 3.66551e-4, 0.0120200)),
    4: (2, (22.9764, 0.183674), (32.9079, 5.65311e-4, 0.0043270)),
}


def opt_family(model: str, engine: str = "distserve") -> Family:
    """`model` and `engine` are keys above. In each shape that its layers can be cut into and whose
    memory holds it and two requests of full length for each stage."""
    size, adds = MODELS[model], ENGINES[engine]
    fits = _fits_175b(adds) if model == "opt-175b" else adds.fits[model]
    name = f"{model}-a100" + ("" if engine == "distserve" else f"-{engine}")
    shapes = {
        (tp, pp): _profile(name, size, adds, fit, tp, pp)
        for tp, fit in fits.items()
        for pp in STAGES
        if size.num_layers % pp == 0 and _num_tokens(size, tp * pp) >= 2 * pp * MAX_MODEL_LEN
    }
    return Family(name, f"DistServe's fits of {engine} and its count of KV tokens", shapes)


def _num_tokens(size: Model, num_gpus: int) -> int:
    return size.gpu_tokens * num_gpus - size.weight_tokens


def _fits_175b(engine: Engine) -> dict[int, Fit]:
    fits = {}
    for tp, (num_stages, prefill, decode) in STAGE_FITS_175B.items():
        fixed, token = (num_stages * engine.prefill_factor * term for term in prefill)
        first, context, sequence = (num_stages * engine.decode_factor * term for term in decode)
        steps = (first, context, sequence)
        fits[tp] = Fit((fixed, token, 0.0), steps, steps)
    fits[8] = Fit(
        *(
            _scaled(four, *both)
            for four, *both in zip(
                fits[4], engine.fits["opt-66b"][4], engine.fits["opt-66b"][8], strict=True
            )
        )
    )
    return fits


def _scaled(terms: Terms, four: Terms, eight: Terms) -> Terms:
    first, second, third = (
        term * after / before for term, before, after in zip(terms, four, eight, strict=True)
    )
    return first, second, third


def _profile(name: str, size: Model, engine: Engine, fit: Fit, tp: int, pp: int) -> Profile:
    return Profile(
        name,
        f"DistServe's fit for tp{tp}, in {pp} stages; handoff: NVLink's nominal rate;"
        " noise assumed",
        _cost(fit, fit.small, engine, pp, _cost(fit, fit.large, engine, pp, None)),
        noise=NOISE,
        num_kv_tokens=_num_tokens(size, tp * pp),
        kv_bytes_per_token=size.kv_bytes_per_token,
        handoff_bytes_per_s=tp * pp * NVLINK_BYTES_PER_S,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        max_model_len=MAX_MODEL_LEN,
        num_stages=pp,
        num_gpus=tp * pp,
    )


def _cost(fit: Fit, decode: Terms, engine: Engine, pp: int, large: StepCost | None) -> StepCost:
    launch, launch_token = engine.launch
    fixed, token, square = fit.prefill
    first, context, sequence = decode
    between_stages = pp * pp if pp > 1 else 0
    return StepCost(
        prefill_fix_s=1e-3 * (fixed + between_stages + launch),
        decode_fix_s=1e-3 * (first + launch),
        token_s=1e-3 * (token + launch_token),
        attention_s=1e-3 * 2 * square,  # theirs counts len^2, ours half of it
        decode_seq_s=1e-3 * sequence,
        kv_token_s=1e-3 * (context + launch_token),
        large=large,
        large_seqs=LARGE_SEQS if large else 0,
    )
