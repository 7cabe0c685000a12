"""`nodeserve start --layout auto`: plan first, then start what came of it."""

import os
import time
from dataclasses import replace
from typing import Any

import click

from nodeserve import profile_store
from nodeserve.checkpoint import Checkpoint
from nodeserve.checkpoint import resolve as resolve_checkpoint
from nodeserve.cli.plan import UNTRIED, check_requests, progress, slo_of, within
from nodeserve.cli.startable import (
    fits,
    holds,
    knows_teams,
    on_gpus,
    startable,
    starts,
    whole_worker,
)
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.places import SIM_DEVICES
from nodeserve.coordinator.policies import policies_of
from nodeserve.errors import ConfigError
from nodeserve.gpus import Gpus
from nodeserve.layout import parse_gpus, parse_layout
from nodeserve.plan.candidates import by_formula
from nodeserve.plan.efforts import EFFORTS
from nodeserve.plan.evaluate import Question
from nodeserve.plan.planner import plan
from nodeserve.plan.pool import searching
from nodeserve.plan.requests import Source
from nodeserve.plan.verdict import context_of, settings_of, verdict

WORKLOAD = "chat"
EFFORT = EFFORTS["quick"]


def planned(config: EngineConfig, gpus: Gpus) -> EngineConfig:
    """Settings whose layout is "auto", with a layout, a chunk and a window in its place; said on
    stderr. ConfigError where nothing is known to plan with, or nothing is in time."""
    if config.slo is None:
        raise ConfigError("--layout auto plans for limits: give --slo such as ttft=500ms,tpot=50ms")
    began_s = time.monotonic()
    name = config.profile or measured_name(config, gpus)
    here = None if config.device == "sim" else checkpoint_of(config).config
    asked = question_of(config, name, config.slo, devices_of(config, gpus, name))
    own = here.max_position if here else asked.any_profile.max_model_len
    question = with_shapes(within(asked, own), config, here, gpus)
    check_requests(question)
    workload = config.workload or WORKLOAD
    click.echo(f"planning for {workload} on {question.num_gpus} devices, profile {name}", err=True)
    with searching() as run, progress(quiet=False) as tell:
        report = plan(question, EFFORT, run, tell)
        said = verdict(report)
    if report.best is None:
        raise ConfigError(f"--layout auto: {said.reason}")
    best = report.best.candidate
    seconds = time.monotonic() - began_s
    click.echo(f"layout {best.layout}: {said.reason} (planned in {seconds:.0f} s)", err=True)
    tell_unknown(question, best.layout, here is not None and uses_gpus(config, gpus))
    settings: dict[str, Any] = settings_of(best, question)
    settings["max_model_len"] = context_of(question, own)
    settings["gpus"] = gpus_for(best.layout, config.gpus)
    on_devices = config if config.device == "sim" else replace(config, profile=None)
    return replace(on_devices, workload=None, **settings)


def question_of(config: EngineConfig, profile: str, slo: str, num_devices: int) -> Question:
    """What is planned for, with all that was asked of the server."""
    source = Source(config.workload or WORKLOAD, seed=config.seed)
    # How many in a pass is the question's; how they leave the buffer is as it was asked for.
    policies = policies_of(config, config.max_num_seqs or 1, config.max_num_batched_tokens or 1)
    return Question(
        profile_store.profile_or_family(profile),
        source,
        slo_of(slo, source),
        num_devices,
        seed=config.seed,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        dispatch=policies.dispatch,
        decode_allocation=policies.decode_allocation,
    )


def with_shapes(
    question: Question, config: EngineConfig, model: ModelConfig | None, gpus: Gpus
) -> Question:
    """With the shapes that can be started here, and the memory that each has then; said on stderr
    which ones cannot be. `model` is None where devices are simulated: they take any."""
    context = question.context
    profile = question.model.within(context, config.kv_memory)
    checks = [holds(context, config.block_size)]
    if model is not None:
        of_device = (
            on_gpus(config, model, context, gpus)
            if uses_gpus(config, gpus)
            else knows_teams(question.model)
        )
        starting = starts(config, model, context)
        checks = [whole_worker, fits(model), *checks, starting, of_device]
    found = startable(profile, question.num_gpus, question.eps, checks)
    for note in found.notes():
        click.echo(note, err=True)
    return replace(question, model=profile, shapes=found.shapes)


def tell_unknown(question: Question, layout: str, on_gpus: bool) -> None:
    """Says on stderr what nobody has seen of a layout."""
    if unmeasured := ", ".join(map(str, by_formula(question.model, [layout]))):
        click.echo(f"by formula, not measured (docs/plan.md): passes of {unmeasured}", err=True)
    if on_gpus and ":" in layout:
        click.echo(f"note: {UNTRIED}", err=True)


def gpus_for(layout: str, gpus: str | None) -> str | None:
    """As many of those given as a layout takes: a start refuses what it would leave over."""
    if gpus is None:
        return None
    used = parse_gpus(gpus)[: parse_layout(layout).num_workers]
    return ",".join(map(str, used))


def uses_gpus(config: EngineConfig, gpus: Gpus) -> bool:
    return config.device != "cpu" and gpus.usable


def checkpoint_of(config: EngineConfig) -> Checkpoint:
    return resolve_checkpoint(config.model, config.load_format, config.model_impl)


def measured_name(config: EngineConfig, gpus: Gpus) -> str:
    """The name under which `nodeserve profile` stores this model on this machine."""
    if config.device == "sim":
        raise ConfigError("--device sim needs a --profile, also with --layout auto")
    model = checkpoint_of(config).served_name
    kind = gpus.found[0].name if uses_gpus(config, gpus) else "cpu"
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
    if uses_gpus(config, gpus):
        return len(gpus.found)
    threads = profile_store.measured(name).get("threads", 1)
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(threads)))
