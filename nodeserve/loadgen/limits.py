"""Limits as people write them: "ttft:200" in milliseconds, "ttft:5x" of an idle server's time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nodeserve.errors import ConfigError
from nodeserve.loadgen.records import Unloaded
from nodeserve.plan.goodput import Slo
from nodeserve.plan.records import Arrival

NAMES = ("ttft", "tpot", "e2el")  # as vLLM's benchmark spells them


class Bound(NamedTuple):
    """Seconds, or a multiple of what the same request takes alone."""

    value: float
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    ttft: Bound | None = None
    tpot: Bound | None = None
    e2el: Bound | None = None

    @property
    def relative(self) -> bool:
        """Whether an idle server must be measured first."""
        return any(one is not None and one.relative for one in (self.ttft, self.tpot, self.e2el))

    def of_request(self) -> dict[str, float]:
        """Absolute ones as a request carries them, in milliseconds."""
        carried = {"ttft_ms": self.ttft, "tpot_ms": self.tpot}
        return {name: 1e3 * one.value for name, one in carried.items() if one is not None}

    def slo(self, arrival: Arrival, unloaded: Unloaded | None) -> Slo:
        """The limits of one request; `unloaded` is needed where one is relative."""
        if not self.relative:
            return Slo(*(one and one.value for one in (self.ttft, self.tpot, self.e2el)))
        assert unloaded is not None
        num_prompt, num_output = arrival.num_prompt_tokens, arrival.num_output_tokens
        alone = (
            unloaded.ttft_s(num_prompt),
            unloaded.tpot_s,
            unloaded.e2e_s(num_prompt, num_output),
        )
        bounds = (self.ttft, self.tpot, self.e2el)
        return Slo(
            *(
                None if one is None else one.value * (time_s if one.relative else 1.0)
                for one, time_s in zip(bounds, alone, strict=True)
            )
        )

    def words(self) -> str:
        """As they were written."""
        given = {name: getattr(self, name) for name in NAMES}
        return " ".join(
            f"{name}:{one.value:g}x" if one.relative else f"{name}:{1e3 * one.value:g}"
            for name, one in given.items()
            if one is not None
        )


def parse_limits(words: Sequence[str]) -> Limits:
    """Read "ttft:200", "tpot:50", "e2el:9000" in milliseconds, or "ttft:5x"; each at most once."""
    found: dict[str, Bound] = {}
    for word in " ".join(words).split():
        name, _, number = word.partition(":")
        relative = number.endswith("x")
        value = _number(number.removesuffix("x"))
        if name not in NAMES or name in found or value is None:
            raise ConfigError(
                f"--goodput {word}: use ttft, tpot or e2el once each, with milliseconds or a"
                " multiple of the unloaded time, such as ttft:200 tpot:50 or ttft:5x tpot:2x"
            )
        found[name] = Bound(value, True) if relative else Bound(value / 1e3)
    return Limits(**found)


def limits_of(slo: Slo) -> Limits:
    """An SLO as limits."""
    return Limits(*(None if one is None else Bound(one) for one in slo.limits))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0.0 < number < math.inf else None
