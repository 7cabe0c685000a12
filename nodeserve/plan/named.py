"""Workloads that have a name: lengths, arrivals and the SLO that belongs to them."""

import re
from dataclasses import dataclass

from nodeserve.errors import ConfigError
from nodeserve.plan import grids
from nodeserve.plan.goodput import Slo
from nodeserve.plan.grids import Grid
from nodeserve.plan.workloads import Gaps, GridGaps, Lengths, parse_lengths

_SYNTHETIC = re.compile(r"synthetic\(\s*([^,()]+?)\s*,\s*([^,()]+?)\s*\)")


@dataclass(frozen=True, slots=True)
class Named:
    """What requests of a kind look like. `slo` is a usual one for full lengths and models of the
    source's size: a start, not a law."""

    name: str
    prompt: Lengths | Grid
    output: Lengths | Grid
    gaps: Gaps | GridGaps
    slo: Slo
    source: str


NAMED = {
    one.name: one
    for one in (
        Named(
            "chat",
            grids.CHAT_IN,
            grids.CHAT_OUT,
            Gaps(),
            Slo(2.0, 0.1),
            "Azure LLM inference 2023, conversation",
        ),
        Named(
            "code",
            grids.CODE_IN,
            grids.CODE_OUT,
            GridGaps(grids.CODE_GAPS),
            Slo(2.0, 0.1),
            "Azure LLM inference 2023, code: bursts of long prompts with short answers",
        ),
        Named(
            "summarise",
            grids.SUMMARY_IN,
            grids.SUMMARY_OUT,
            Gaps(),
            Slo(6.0, 0.175),
            "arXiv papers and abstracts, answers up to 1,024 tokens",
        ),
        Named(
            "long-chat",
            grids.LONG_CHAT_IN,
            grids.LONG_CHAT_OUT,
            Gaps(),
            Slo(30.0, 0.2),
            "Mooncake conversation; without its shared prefixes, which only the trace has",
        ),
        Named(
            "reasoning",
            grids.REASONING_IN,
            grids.REASONING_OUT,
            Gaps(),
            Slo(2.0, 0.08),
            "ServeGen, clients of DeepSeek-R1",
        ),
        Named(
            "sharegpt",
            grids.SHAREGPT_IN,
            grids.SHAREGPT_OUT,
            Gaps(),
            Slo(0.25, 0.1),
            "first turns of ShareGPT, at most 1,024 tokens in and 2,048 in all",
        ),
        Named(
            "humaneval",
            grids.HUMANEVAL_IN,
            grids.HUMANEVAL_OUT,
            Gaps(),
            Slo(0.125, 0.2),
            "HumanEval's prompts and solutions",
        ),
    )
}


def workload_named(name: str) -> Named:
    """A workload by its name, or synthetic(IN,OUT) with lengths as `parse_lengths` reads them.

    ConfigError lists what there is.
    """
    if name in NAMED:
        return NAMED[name]
    if match := _SYNTHETIC.fullmatch(name):
        prompt, output = parse_lengths(match[1]), parse_lengths(match[2])
        return Named(name, prompt, output, Gaps(), Slo(), "synthetic")
    raise ConfigError(
        f"no workload {name!r}: use {', '.join(NAMED)}, or synthetic(IN,OUT) with numbers of tokens"
        " or distributions, such as synthetic(512,64) or synthetic(lognormal:1500,200)"
    )
