"""Copies of hot experts: may they be had, and by which counts are they chosen?"""

from pathlib import Path

from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.errors import ConfigError
from nodeserve.expert_counts import Counts, read_counts
from nodeserve.layout import Layout


def choose_counts(config: EngineConfig, model: ModelConfig, layout: Layout) -> Counts | None:
    """The counts that ranks share experts by; None: none were given. ConfigError for more copies
    than there are places, and where nobody shares experts or nothing says which ones are hot."""
    copies = config.redundant_experts
    if copies < 0:
        raise ConfigError(f"--redundant-experts {copies}: use 0 or more")
    if config.expert_counts is None:
        if copies:
            raise ConfigError(
                f"--redundant-experts {copies}: give --expert-counts too, they say which experts"
                " are hot; `nodeserve experts --out FILE` writes them"
            )
        return None
    degrees = [group.shape.ep for group in layout.groups if group.shape.ep > 1]
    if model.moe is None or not degrees:
        raise ConfigError(
            f"--expert-counts: no ranks share experts in layout {layout} of this model: use epN,"
            " with a mixture of experts, or leave it out"
        )
    most = model.moe.num_experts * (min(degrees) - 1)
    if copies > most:
        raise ConfigError(
            f"--redundant-experts {copies}: a rank holds an expert once, so ep{min(degrees)} with"
            f" {model.moe.num_experts} experts has room for {most} copies a layer: use fewer"
        )
    return read_counts(Path(config.expert_counts), model)
