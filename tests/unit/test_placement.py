"""From settings to places: what is chosen, and the words of every refusal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ForeignConfig, ModelConfig, MoeConfig, Simulated
from nodeserve.coordinator.placement import Plan, resolve
from nodeserve.coordinator.places import Seat, choose_layout, parts_of, share_cores
from nodeserve.coordinator.policies import Policies, parse_window, policies_of
from nodeserve.errors import ConfigError
from nodeserve.gpus import Gpu, Gpus
from nodeserve.layout import parse_layout
from nodeserve.policy.flow import FlowOptions
from nodeserve.policy.profiles import profile_named
from nodeserve.policy.restarts import RestartOptions
from nodeserve.policy.units import DispatchOptions
from nodeserve.types import Role

M, P, D = Role.MIXED, Role.PREFILL, Role.DECODE
MODEL = ModelConfig("llama", 100, 64, 128, 2, 4, 2, 16, 1024, 1e-5, 1e4)
CHECKPOINT = Checkpoint(Path("x"), "gguf", MODEL, "tiny")
NONE = Gpus(obstacle="no NVIDIA driver answers")


def gpus(count: int, obstacle: str | None = None) -> Gpus:
    return Gpus(tuple(Gpu(i, "H200", 141 << 30, 140 << 30) for i in range(count)), obstacle)


REFUSED = {
    "block size": (EngineConfig(block_size=24), "--block-size must be a multiple of 16"),
    "no sequences": (EngineConfig(max_num_seqs=0), "--max-num-seqs must be at least 1"),
    "small budget": (EngineConfig(max_num_batched_tokens=8), "below --max-num-seqs"),
    "dtype": (EngineConfig(dtype="int8"), "--dtype int8: use auto, bfloat16"),
    "model code": (EngineConfig(model_impl="vllm"), "--model-impl vllm: use auto, nodeserve or"),
    "device": (EngineConfig(device="tpu"), "--device tpu: use auto, cuda, cpu or sim"),
    "attention": (EngineConfig(attention_backend="fa"), "--attention-backend fa: use auto, flash-"),
    "admission": (
        EngineConfig(admission="batched"),
        "--admission batched: use round-robin, fewest",
    ),
    "allocation": (EngineConfig(decode_allocation="best"), "fewest-requests, iqr or cost"),
    "overload": (EngineConfig(on_overload="drop"), "--on-overload drop: use reject or queue"),
    "window": (EngineConfig(window="soon"), "--window soon: use auto, off or milliseconds"),
    "negative window": (EngineConfig(window="-1"), "--window -1: use auto, off or milliseconds"),
    "endless window": (EngineConfig(window="inf"), "--window inf: use auto, off or milliseconds"),
    "k": (EngineConfig(window_k=-0.5), "--window-k -0.5: use 0 to 100"),
    "k of nothing": (EngineConfig(window_k=float("nan")), "--window-k nan: use 0 to 100"),
    "no clients": (EngineConfig(max_connections=0), "--max-connections must be at least"),
    "no rate": (
        EngineConfig(max_connection_rate=0.0),
        "--max-connection-rate 0: use a number above",
    ),
    "endless drain": (EngineConfig(drain_timeout=float("inf")), "--drain-timeout inf: use seconds"),
    "no start": (EngineConfig(startup_timeout=0.0), "--startup-timeout 0: use seconds above 0"),
    "no queue": (EngineConfig(max_num_queued_tokens=0), "--max-num-queued-tokens must be at least"),
    "utilization": (EngineConfig(gpu_memory_utilization=90.0), "such as 0.9"),
    "cuda": (EngineConfig(device="cuda"), "--device cuda: no NVIDIA driver answers"),
    "gpus on cpu": (EngineConfig(device="cpu", gpus="0-1"), "contradict"),
    "gpus and layout": (EngineConfig(layout="1p1d", gpus="0-3"), "2 left over"),
    "more ranks than heads": (EngineConfig(layout="1m:tp8"), "use tp4 or less"),
    "more stages than layers": (EngineConfig(layout="1m:pp3"), "use pp2 or less"),
    "ranks without experts": (
        EngineConfig(layout="1p:ep2,2d"),
        "experts, of which this model has 0: use tp",
    ),
    "sim without profile": (EngineConfig(device="sim"), "use one of moe-ep8"),
    "profile without sim": (EngineConfig(profile="moe-ep8"), "is for --device sim"),
    "context": (EngineConfig(max_model_len=5000), "use 2 to 1024"),
    "pages too small": (EngineConfig(kv_memory=4096), "--kv-memory 4096 is below"),
    "pages too large": (EngineConfig(kv_memory=1 << 50), "--shm-size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        resolve(config, CHECKPOINT, NONE)
    assert words in str(caught.value)


def test_auto_is_resolved_to_numbers() -> None:
    plan = resolve(EngineConfig(layout="1p1d", max_model_len=512), CHECKPOINT, NONE)
    assert plan.config.dtype == "bfloat16" and plan.config.device == "cpu"
    assert plan.config.served_model_name == "tiny" and plan.config.layout == "1p1d"
    assert plan.max_model_len == 512 and plan.max_num_batched_tokens == 128
    assert plan.max_num_seqs == 64
    assert plan.kv_memory is not None and plan.kv_memory >= MODEL.kv_bytes_per_token(2) * 512
    assert [place.role for place in plan.places] == [P, D]


@pytest.mark.parametrize(
    ("text", "window_s"),
    [("auto", None), ("off", 0.0), ("0", 0.0), ("12.5", 0.0125), ("20ms", 0.02)],
)
def test_a_window_is_auto_off_or_milliseconds(text: str, window_s: float | None) -> None:
    assert parse_window(text) == window_s


def test_the_policy_gets_what_was_asked_for() -> None:
    config = EngineConfig(
        admission="pull",
        window="5",
        window_k=0.5,
        decode_allocation="iqr",
        max_num_queued_reqs=7,
        max_num_queued_tokens=70_000,
        on_overload="queue",
        max_restarts=3,
        restart_delay=1.5,
        step_timeout=20.0,
    )
    policies = policies_of(config, max_num_seqs=32, max_num_batched_tokens=512)
    assert policies == Policies(
        DispatchOptions("pull", 0.005, 0.5, budget=512, max_num_seqs=32),
        "iqr",
        FlowOptions(7, 70_000, "queue"),
        {},
        RestartOptions(3, 1.5),
        20.0,
    )


def alone(*roles: Role) -> tuple[Seat, ...]:
    return tuple(Seat(role, instance, 0) for instance, role in enumerate(roles))


def test_two_cores_get_a_prefill_and_a_decode_worker() -> None:
    assert str(choose_layout(None, 2)) == "1p1d"
    assert str(choose_layout(None, 1)) == "1m"


def test_cores_are_shared_out_without_overlap() -> None:
    places, notes = share_cores(alone(P, D, D), (0, 1, 2, 3, 4, 5, 6))
    assert [place.cpus for place in places] == [(0, 1, 2), (3, 4), (5, 6)]
    assert [place.num_threads for place in places] == [3, 2, 2] and not notes


@pytest.mark.parametrize(
    "layout", ["1p:tp2,1d", "1p:pp2,1d:tp2", "1p:tp4,1d:tp2.pp2", "1p,1d:pp2", "1p:tp2,1d:pp2,1m"]
)
def test_phases_may_have_different_shapes(layout: str) -> None:
    assert str(resolve(EngineConfig(layout=layout), CHECKPOINT, NONE).layout) == layout
    assert str(resolve(EngineConfig(layout=layout), CHECKPOINT, gpus(8)).layout) == layout
    assert str(simulated(layout=layout).layout) == layout


def test_each_worker_of_an_instance_has_a_place_and_memory_for_its_part() -> None:
    plan = resolve(EngineConfig(layout="1p:tp2,1d:tp2"), CHECKPOINT, NONE)
    assert [(one.role, one.instance, one.rank) for one in plan.places] == [
        *((P, 0, 0), (P, 0, 1)),
        *((D, 1, 0), (D, 1, 1)),
    ]
    on_gpus = resolve(EngineConfig(layout="1m:tp2.pp2"), CHECKPOINT, gpus(8))
    assert [place.gpus[0] for place in on_gpus.places] == [0, 1, 2, 3]
    one_block = MODEL.kv_bytes_per_token(2) * 16
    asked = EngineConfig(layout="1m:tp2.pp2", kv_memory=65 * one_block // 4)
    assert resolve(asked, CHECKPOINT, NONE).kv_memory == 65 * one_block // 4
    with pytest.raises(ConfigError, match="is below"):
        resolve(replace(asked, layout="1m:tp2"), CHECKPOINT, NONE)


def test_more_workers_than_cores_take_turns_and_say_so() -> None:
    places, (note,) = share_cores(alone(M, M, M), (4, 6))
    assert [place.cpus for place in places] == [(4,), (6,), (4,)]
    assert all(place.num_threads == 1 for place in places)
    assert "3 workers share 2 cores" in note


# ---- GPUs


def test_a_node_of_gpus_is_used_whole() -> None:
    plan = resolve(EngineConfig(), CHECKPOINT, gpus(8))
    assert plan.config.device == "cuda" and plan.config.layout == "4p4d" and not plan.notes
    assert [place.gpus[0] for place in plan.places] == list(range(8))
    assert plan.places[3].gpus == (3, 0, 1, 2, 4, 5, 6, 7)
    assert plan.kv_memory is None and plan.places[0].cpus == ()
    assert (plan.max_num_seqs, plan.max_num_batched_tokens) == (256, 8192)


def test_mixed_workers_take_smaller_steps() -> None:
    plan = resolve(EngineConfig(layout="2m"), CHECKPOINT, gpus(8))
    assert plan.max_num_batched_tokens == 2048
    assert [place.gpus for place in plan.places] == [(0, 1), (1, 0)]


def test_only_visible_gpus_are_used_in_their_order() -> None:
    visible = gpus(8).seen_through("5,2,7")
    plan = resolve(EngineConfig(layout="1p1d"), CHECKPOINT, visible)
    assert [place.gpus for place in plan.places] == [(5, 2), (2, 5)]
    with pytest.raises(ConfigError, match="no GPU 0 here, there are 5, 2, 7 .CUDA_VISIBLE_DEVICES"):
        resolve(EngineConfig(layout="1p1d", gpus="0-1"), CHECKPOINT, visible)


def test_workers_may_share_a_gpu() -> None:
    plan = resolve(EngineConfig(gpus="2,2", layout="1p1d"), CHECKPOINT, gpus(4))
    assert [(place.gpus, place.gpu_share) for place in plan.places] == [((2,), 2), ((2,), 2)]


GPU_REFUSED = {
    "not there": (EngineConfig(gpus="0-7", layout="4p4d"), "no GPU 4 here, there are 0, 1"),
    "too few": (EngineConfig(layout="4p4d"), "4 missing"),
    "left over": (EngineConfig(layout="1p1d", gpus="0-3"), "2 left over"),
    "pages too small": (EngineConfig(kv_memory=4096), "--kv-memory 4096 is below"),
}


@pytest.mark.parametrize("name", GPU_REFUSED)
def test_what_the_gpus_cannot_do_is_refused(name: str) -> None:
    config, words = GPU_REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        resolve(config, CHECKPOINT, gpus(4))
    assert words in str(caught.value)


def test_cpu_workers_stand_in_and_say_so() -> None:
    plan = resolve(EngineConfig(gpus="0-1", layout="1p1d"), CHECKPOINT, NONE)
    assert plan.config.device == "cpu"
    assert "CPU workers stand in for --gpus 0-1: no NVIDIA driver answers" in plan.notes


def test_gpus_that_cannot_be_used_are_mentioned() -> None:
    plan = resolve(EngineConfig(layout="1m"), CHECKPOINT, gpus(2, "torch is a CPU build"))
    assert plan.config.device == "cpu"
    assert plan.notes == ("GPUs are here but not used: torch is a CPU build",)
    asked_for = resolve(EngineConfig(layout="1m", device="cpu"), CHECKPOINT, gpus(2))
    assert asked_for.config.device == "cpu" and not asked_for.notes


def test_settings_for_gpus_say_that_they_do_nothing_on_cpus() -> None:
    plan = resolve(EngineConfig(layout="1m", handoff="host", enforce_eager=True), CHECKPOINT, NONE)
    assert plan.notes == ("no effect on CPU workers: --handoff, --enforce-eager",)


# ---- simulated devices


def simulated(**settings: Any) -> Plan:
    chosen = {"profile": "moe-ep8", **settings}
    return resolve(EngineConfig(device="sim", **chosen), CHECKPOINT, NONE)


def test_a_profile_says_what_a_simulated_device_holds() -> None:
    plan, profile = simulated(seed=3), profile_named("moe-ep8")
    assert plan.config.device == "sim" and plan.config.layout == "4p4d" and not plan.notes
    assert plan.max_model_len == profile.max_model_len > MODEL.max_position
    assert plan.max_num_seqs == profile.max_num_seqs
    assert plan.max_num_batched_tokens == profile.max_num_batched_tokens
    assert plan.kv_memory is None, "each worker finds what its shape holds"
    assert plan.simulated == Simulated("moe-ep8", 3, MODEL.vocab_size, MODEL.eos_token_ids)
    assert all(place.cpus == place.gpus == () for place in plan.places)


def test_settings_win_over_a_profile() -> None:
    plan = simulated(
        max_model_len=100, max_num_seqs=7, max_num_batched_tokens=64, kv_memory=1 << 30
    )
    assert (plan.max_model_len, plan.max_num_seqs) == (100, 7)
    assert (plan.max_num_batched_tokens, plan.kv_memory) == (64, 1 << 30)


def test_a_family_of_profiles_gives_each_shape_its_own() -> None:
    """66B of OPT fits no single GPU; a worker that was not told otherwise finds its own memory."""
    plan = simulated(layout="1p:tp2,1d:tp2", profile="opt-66b-a100")
    assert plan.simulated is not None and plan.simulated.profile == "opt-66b-a100"
    assert plan.kv_memory is None and plan.max_model_len == 2048 and not plan.notes
    (note,) = simulated(layout="1p:tp2,1d").notes
    assert note == "passes of tp2 by formula, not measured (docs/instances.md)"


def test_every_rank_of_a_simulated_instance_is_a_worker() -> None:
    plan = simulated(layout="2p:ep3,1d", gpus="0-6")
    places = [(place.role, place.instance, place.rank) for place in plan.places]
    prefill = [(P, instance, rank) for instance in (0, 1) for rank in (0, 1, 2)]
    assert places == [*prefill, (D, 2, 0)]


def test_plain_layouts_have_an_instance_for_each_worker() -> None:
    for plan in (
        resolve(EngineConfig(layout="2p1d"), CHECKPOINT, NONE),
        resolve(EngineConfig(layout="2p1d"), CHECKPOINT, gpus(3)),
        simulated(layout="2p1d"),
    ):
        assert [(place.instance, place.rank) for place in plan.places] == [(0, 0), (1, 0), (2, 0)]


SIM_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "devices": ({"layout": "1p:ep4,1d", "gpus": "0-7"}, "3 left over"),
    "shape of a whole rank": (
        {"layout": "1m:tp2", "profile": "llama-2-70b-tp8-h100"},
        "says nothing of tp2",
    ),
    "shape without room": ({"layout": "1m", "profile": "opt-66b-a100"}, "no tp1.pp1: use one of"),
    "context": ({"max_model_len": 1 << 20}, "use 2 to 32768"),
    "pages too small": ({"kv_memory": 4096}, "--kv-memory 4096 is below"),
    "pages too large": ({"kv_memory": 10**15}, f"--kv-memory {10**15}: at most 4715"),
}


@pytest.mark.parametrize("name", SIM_REFUSED)
def test_what_cannot_be_simulated_is_refused(name: str) -> None:
    settings, words = SIM_REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        simulated(**settings)
    assert words in str(caught.value)


def test_auto_never_simulates_and_idle_settings_are_named() -> None:
    plan = resolve(EngineConfig(layout="1m"), CHECKPOINT, NONE)
    assert plan.config.device == "cpu" and plan.simulated is None
    (note,) = simulated(dtype="float16", handoff="host").notes
    assert note == "no effect on simulated workers: --dtype, --handoff"


def large(num_layers: int) -> Checkpoint:
    """Some 10 GB a layer."""
    model = ModelConfig("llama", 100, 1 << 15, 1 << 16, num_layers, 4, 2, 16, 1024, 1e-5, 1e4)
    return Checkpoint(Path("x"), "gguf", model, "large")


def test_weights_that_fit_no_memory_are_refused_before_any_is_read() -> None:
    with pytest.raises(ConfigError, match="the weights take .* for each of 1 workers"):
        resolve(EngineConfig(layout="1m"), large(1000), NONE)
    resolve(EngineConfig(layout="2m", max_model_len=1024), large(10), gpus(2))
    with pytest.raises(ConfigError, match="GPU 0 has .* and the weights and one sequence"):
        resolve(EngineConfig(layout="2m", max_model_len=1024), large(20), gpus(2))
    with pytest.raises(ConfigError, match="GPU 1 has .* and the weights and one sequence"):
        resolve(EngineConfig(layout="2m", gpus="1,1"), large(10), gpus(2))


MIXTURE = replace(
    MODEL,
    num_layers=6,
    vocab_size=128,
    moe=MoeConfig(8, 2, 1 << 10, shared_intermediate_size=256, dense_layers=(0, 1)),
)


@pytest.mark.parametrize("shape", ["tp2", "pp2", "pp3", "tp2.pp2", "ep4"])
def test_the_parts_of_workers_are_the_whole_model(shape: str) -> None:
    """Nobody has experts, words or layers that are another's; each rank has every router."""
    team = parse_layout(f"1m:{shape}").groups[0].shape
    whole = MIXTURE.num_weights
    parts = [part.num_weights for part in parts_of(MIXTURE, team)]
    if team.ep > 1:
        routed = MIXTURE.num_routed_weights
        router = 4 * MIXTURE.hidden_size * 8 * (1 - 1 / team.ep)  # counted by the experts held
        assert parts == [whole - routed * (1 - 1 / team.ep) - router]
    else:
        routers = 4 * MIXTURE.hidden_size * 8
        assert sum(parts) == whole + (team.tp - 1) * routers


def test_a_mixture_runs_on_gpus_that_hold_it_together() -> None:
    """12 GB of experts in a layer."""
    moe = MoeConfig(8, 2, 1 << 15, dense_layers=(0, 1, 2))
    model = replace(MODEL, hidden_size=1 << 13, num_layers=15, moe=moe)
    checkpoint = replace(CHECKPOINT, config=model)
    with pytest.raises(ConfigError, match="the weights and one sequence"):
        resolve(EngineConfig(layout="1m"), checkpoint, gpus(2))
    for layout in ("1m:tp2", "1m:ep2", "1m:pp2"):
        resolve(EngineConfig(layout=layout), checkpoint, gpus(2))


def test_weights_are_counted_as_the_embedded_model_has_them() -> None:
    model = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e4)
    assert replace(model, tie_embeddings=True).num_weights == pytest.approx(134.5e6, rel=1e-3)
    assert model.num_weights == pytest.approx((134.5 + 28.3) * 1e6, rel=1e-3)


def test_a_start_gets_longer_with_the_model_unless_somebody_says_how_long() -> None:
    small = resolve(EngineConfig(layout="1m"), CHECKPOINT, gpus(1)).startup_timeout_s
    assert resolve(EngineConfig(layout="1m"), large(10), gpus(1)).startup_timeout_s > 4 * small
    asked = EngineConfig(layout="1m", startup_timeout=7.5)
    assert resolve(asked, large(10), gpus(1)).startup_timeout_s == 7.5


def test_a_model_by_other_code_is_told_of_and_runs_on_single_cpu_workers() -> None:
    model = replace(MODEL, architecture="transformers", foreign=ForeignConfig("x", "gpt2"))
    checkpoint = replace(CHECKPOINT, config=model)
    plan = resolve(EngineConfig(layout="1p1d"), checkpoint, NONE)
    assert [note for note in plan.notes if "gpt2 runs as transformers' own code" in note]
    with pytest.raises(ConfigError, match="gpt2 .* on CPUs only so far: give --device cpu"):
        resolve(EngineConfig(layout="1m"), checkpoint, gpus(1))
    with pytest.raises(ConfigError, match="on one worker an instance"):
        resolve(EngineConfig(layout="1m:tp2"), checkpoint, NONE)
