"""The policy's settings: from the words of the command line to what the policy takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nodeserve.config import EngineConfig, parse_slo
from nodeserve.errors import ConfigError
from nodeserve.policy.flow import FlowOptions
from nodeserve.policy.restarts import RestartOptions
from nodeserve.policy.units import DispatchOptions

MAX_WINDOW_MS = 60_000.0
MAX_WINDOW_K = 100.0
LEAST_TIMEOUT_S = 0.1  # the system may keep a process from running for some of it


@dataclass(frozen=True, slots=True)
class Policies:
    """How requests are taken in, sent to prefill and sent on to decode."""

    dispatch: DispatchOptions
    decode_allocation: str
    flow: FlowOptions
    slo: Mapping[str, float]  # of requests that bring none: ttft_ms, tpot_ms
    restarts: RestartOptions
    step_timeout_s: float | None  # None: from what steps take


def policies_of(config: EngineConfig, max_num_seqs: int, max_num_batched_tokens: int) -> Policies:
    """`config` with names that are known; ConfigError says what else is wrong with it."""
    if not 0.0 <= config.window_k <= MAX_WINDOW_K:
        raise ConfigError(f"--window-k {config.window_k:g}: use 0 to {MAX_WINDOW_K:g}, such as 1")
    return Policies(
        dispatch=DispatchOptions(
            admission=config.admission,
            window_s=parse_window(config.window),
            window_k=config.window_k,
            budget=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
        ),
        decode_allocation=config.decode_allocation,
        flow=FlowOptions(
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_num_queued_tokens=config.max_num_queued_tokens,
            on_overload=config.on_overload,
        ),
        slo={} if config.slo is None else parse_slo(config.slo),
        restarts=restarts_of(config),
        step_timeout_s=config.step_timeout,
    )


def restarts_of(config: EngineConfig) -> RestartOptions:
    """How often and when workers are started again; ConfigError for numbers that cannot be."""
    if config.max_restarts < 0:
        raise ConfigError(f"--max-restarts {config.max_restarts}: use 0 (never) or more")
    if not 0.0 <= config.restart_delay < math.inf:
        raise ConfigError(f"--restart-delay {config.restart_delay:g}: use 0 seconds or more")
    if config.step_timeout is not None and not LEAST_TIMEOUT_S <= config.step_timeout < math.inf:
        raise ConfigError(
            f"--step-timeout {config.step_timeout:g}: use {LEAST_TIMEOUT_S} seconds or more, far"
            " above what a step takes"
        )
    return RestartOptions(config.max_restarts, config.restart_delay)


def parse_window(text: str) -> float | None:
    """The fixed interval in seconds; None: from measured passes; 0: no interval."""
    if text in ("auto", "off"):
        return None if text == "auto" else 0.0
    try:
        milliseconds = float(text.removesuffix("ms"))
    except ValueError:
        milliseconds = math.nan
    if not 0.0 <= milliseconds <= MAX_WINDOW_MS:
        raise ConfigError(
            f"--window {text}: use auto, off or milliseconds up to {MAX_WINDOW_MS:.0f}, such as 20"
        )
    return milliseconds / 1e3
