"""`nodeserve start --layout auto`: plan first, then start what came of it."""

import os
import time
from dataclasses import replace
from typing import Any

import click

from nodeserve import profile_store
from nodeserve.checkpoint import resolve as resolve_checkpoint
from nodeserve.cli.plan import check_requests, progress, slo_of, within
from nodeserve.config import EngineConfig
from nodeserve.coordinator.places import SIM_DEVICES
from nodeserve.coordinator.policies import policies_of
from nodeserve.errors import ConfigError
from nodeserve.gpus import Gpus
from nodeserve.layout import Shape, parse_gpus
from nodeserve.plan.efforts import EFFORTS
from nodeserve.plan.evaluate import Question
from nodeserve.plan.planner import plan
from nodeserve.plan.pool import searching
from nodeserve.plan.requests import Source
from nodeserve.plan.verdict import context_of, settings_of, verdict
from nodeserve.policy.profile import Family, Profile

WORKLOAD = "chat"
EFFORT = EFFORTS["quick"]


def planned(config: EngineConfig, gpus: Gpus) -> EngineConfig:
    """Settings whose layout is "auto", with a layout, a chunk and a window in its place; said on
    stderr. ConfigError where nothing is known to plan with, or nothing is in time."""
    if config.slo is None:
        raise ConfigError("--layout auto plans for limits: give --slo such as ttft=500ms,tpot=50ms")
    began_s = time.monotonic()
    name = config.profile or measured_name(config, gpus)
    source = Source(config.workload or WORKLOAD, seed=config.seed)
    num_devices = devices_of(config, gpus, name)
    model = profile_store.profile_or_family(name)
    if config.device == "sim":  # where a device is one rank, and profiles of several shapes too are
        model = model.of(Shape())
    # How many in a pass is the question's; how they leave the buffer is as it was asked for.
    policies = policies_of(config, config.max_num_seqs or 1, config.max_num_batched_tokens or 1)
    own = own_context(config, model)
    asked = Question(
        model,
        source,
        slo_of(config.slo, source),
        num_devices,
        plain=True,
        seed=config.seed,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        dispatch=policies.dispatch,
        decode_allocation=policies.decode_allocation,
    )
    question = within(asked, own)
    check_requests(question)
    click.echo(f"planning for {source.workload} on {num_devices} devices, profile {name}", err=True)
    with searching() as run, progress(quiet=False) as tell:
        report = plan(question, EFFORT, run, tell)
        said = verdict(report)
    if report.best is None:
        raise ConfigError(f"--layout auto: {said.reason}")
    settings: dict[str, Any] = settings_of(report.best.candidate, question)
    click.echo(
        f"layout {report.best.candidate.layout}: {said.reason}"
        f" (planned in {time.monotonic() - began_s:.0f} s)",
        err=True,
    )
    on_devices = config if config.device == "sim" else replace(config, profile=None)
    settings["max_model_len"] = context_of(question, own)
    return replace(on_devices, workload=None, **settings)


def own_context(config: EngineConfig, model: Profile | Family) -> int:
    """The tokens that the devices would take if nothing were said."""
    if config.device == "sim":
        assert isinstance(model, Profile)
        return model.max_model_len
    return resolve_checkpoint(
        config.model, config.load_format, config.model_impl
    ).config.max_position


def measured_name(config: EngineConfig, gpus: Gpus) -> str:
    """The name under which `nodeserve profile` stores this model on this machine."""
    if config.device == "sim":
        raise ConfigError("--device sim needs a --profile, also with --layout auto")
    model = resolve_checkpoint(config.model, config.load_format, config.model_impl).served_name
    kind = gpus.found[0].name if config.device != "cpu" and gpus.usable else "cpu"
    name = profile_store.name_for(model, kind)
    if name not in profile_store.stored_names():
        command = " ".join(["nodeserve profile", *([config.model] if config.model else [])])
        raise ConfigError(
            f"--layout auto knows nothing of {model} on this machine: run `{command}` once, or give"
            " a --profile"
        )
    return name


def devices_of(config: EngineConfig, gpus: Gpus, name: str) -> int:
    """Workers that a layout may have: GPUs, or shares of the cores as large as those profiled."""
    if config.gpus is not None:
        return len(parse_gpus(config.gpus))
    if config.device == "sim":
        return SIM_DEVICES
    if config.device != "cpu" and gpus.usable:
        return len(gpus.found)
    threads = profile_store.measured(name).get("threads", 1)
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(threads)))
