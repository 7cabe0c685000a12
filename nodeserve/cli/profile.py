"""`nodeserve profile`: what a model's passes take on this machine, stored for the planner."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nodeserve import profile_store
from nodeserve.cli.launch import VISIBLE_GPUS
from nodeserve.cli.progress import start_report
from nodeserve.cli.settings import ENGINE_OPTIONS, given
from nodeserve.config import EngineConfig
from nodeserve.errors import ConfigError
from nodeserve.types import StartEvent

AIM = 0.05  # of what a pass takes: a mean error above it is said
SETTINGS = (
    *("device", "gpus", "max_model_len", "block_size", "kv_memory", "max_num_seqs"),
    *("max_num_batched_tokens", "dtype", "load_format", "gpu_memory_utilization"),
    *("attention_backend", "handoff", "enforce_eager", "seed"),
)


def worker_settings(command: Any) -> Any:
    """Those settings of a server that decide how fast its workers are."""
    options = {option.name: option for option in ENGINE_OPTIONS}
    for name in reversed(SETTINGS):
        command = options[name].decorate(command)
    return command


@click.command()
@click.argument("model", required=False)
@worker_settings
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="How many at once. [default: 2, on one core or GPU 1]",
)
@click.option("--name", help="Of the profile. [default: from the model and the device]")
@click.option("--output", type=click.Path(path_type=Path), help="A file instead of the store.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def profile(
    model: str | None,
    workers: int | None,
    name: str | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what MODEL's passes take on this machine, and store it as a profile.

    Real workers run prompts and batches of many sizes, all of them at once; a cost model is fitted
    and checked on sizes that it was not fitted to. `nodeserve plan`, `simulate` and `start` find
    the profile by its name. Nothing else should run meanwhile.
    """
    from nodeserve.checkpoint import resolve as resolve_checkpoint
    from nodeserve.gpus import find_gpus
    from nodeserve.profiling.measure import measure_profile

    config = EngineConfig(model=model, **given(options))
    if config.device == "sim":
        raise ConfigError("--device sim has a profile already: profile cpu or cuda workers")
    gpus = find_gpus().seen_through(os.environ.get(VISIBLE_GPUS))
    on_gpus = config.device != "cpu" and gpus.usable
    cores = len(os.sched_getaffinity(0))
    count = workers or min(2, len(gpus.found) if on_gpus else cores)
    checkpoint = resolve_checkpoint(config.model, config.load_format, config.model_impl)
    kind = gpus.found[0].name if on_gpus else "cpu"
    name = name or profile_store.name_for(checkpoint.served_name, kind)
    profile_store.check_name(name)
    with start_report() as report:
        result = measure_profile(
            config, checkpoint, gpus, count, name, report.on_event, told(report.on_event)
        )
    measured = {
        "model": checkpoint.served_name,
        "device": kind,
        "workers": count,
        "threads": 0 if on_gpus else max(1, cores // count),
        "passes": result.num_passes,
        "errors": result.noted(),
        "slowdown": round(result.slowdown, 4),
    }
    path = profile_store.write(result.profile, measured, output)
    if as_json:
        click.echo(
            json.dumps(
                {"path": str(path), **profile_store.to_json(result.profile), "measured": measured}
            )
        )
        return
    show(result.noted(), result.num_passes)
    click.echo(f"In service passes take {result.slowdown:.2f} times as long, as the profile says.")
    click.echo(f"{name}: {path}")


def told(on_event: Callable[[StartEvent], None]) -> Callable[[str], None]:
    """Experiments as notes among the lines of the start."""
    return lambda text: on_event(StartEvent("note", None, 0, 0, text))


def show(errors: dict[str, Any], num_passes: int) -> None:
    """The held-out errors, a line for each kind of work."""
    click.echo(f"{num_passes} passes; predicted against measured, on sizes that were held out:")
    for kind, one in errors.items():
        if one is None:
            click.echo(f"  {kind:<8} not measured")
            continue
        far = "" if one["mean"] <= AIM else f"   above the {AIM:.0%} that is aimed for"
        click.echo(
            f"  {kind:<8} {one['mean']:.1%} on average, {one['worst']:.1%} at worst,"
            f" {one['num_groups']} sizes{far}"
        )
