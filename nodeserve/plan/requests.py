"""The requests of a run: a named workload or a trace, scaled as was asked for."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from nodeserve.errors import ConfigError
from nodeserve.plan.named import workload_named
from nodeserve.plan.records import Arrival
from nodeserve.plan.scaling import (
    Traffic,
    check_divisor,
    cut_window,
    fit_context,
    scale_lengths,
    spread_ticks,
    thin,
    traffic,
)
from nodeserve.plan.workloads import (
    BLOCK_TOKENS,
    Workload,
    generate,
    parse_gaps,
    read_trace,
)

NO_LIMIT = 1 << 30  # tokens
SPARE = 1.25  # drawn beyond what is needed, for those that do not fit the context
MANY = 2000  # drawn at least, before it is said that none fits


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from. `trace` wins over `workload`; `gaps` is for workloads ("poisson" or
    "gamma:CV"; None: the workload's own), `share`, `tick_s`, `from_s` and `to_s` are for traces."""

    workload: str = "chat"
    trace: Path | None = None
    gaps: str | None = None
    divisor: float = 1.0  # of all lengths
    share: float = 1.0  # of a trace's requests that are kept
    tick_s: float | None = None
    from_s: float = 0.0
    to_s: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        check_divisor(self.divisor)
        if self.trace is None and self.share != 1.0:
            raise ConfigError(
                "--thin keeps some of a --trace's requests at their times: a workload is drawn at"
                " any --rate, so use that instead"
            )

    @property
    def block_tokens(self) -> int:
        """Of a shared block after the lengths were divided."""
        return max(1, math.ceil(BLOCK_TOKENS / self.divisor))


class Requests:
    """Gives the first requests at any rate: those of a shorter run are the first of a longer one.

    What does not fit `max_tokens`, prompt and output together, is left out before rates are scaled.
    """

    def __init__(self, source: Source, max_tokens: int | None = None) -> None:
        self._source = source
        self._max_tokens = max_tokens
        self.dropped_share = 0.0
        self.own_rate: float | None  # requests a second of the trace; a workload has none
        if source.trace is None:
            self._named = workload_named(source.workload)
            if source.gaps is not None:
                self._named = dataclasses.replace(self._named, gaps=parse_gaps(source.gaps))
            self._all = self._generated(1)
            self.own_rate = None
        else:
            self._all = self._of_trace(source.trace)
            self.own_rate = traffic(self._all).rate

    @property
    def num_available(self) -> int | None:
        """None: as many as may be asked for."""
        return None if self._source.trace is None else len(self._all)

    def times_divided_by(self, rate: float | None) -> float:
        """What all arrival times are divided by for `rate` requests a second: of the whole trace,
        or of a workload that draws one a second on average. So it does not depend on how many
        requests are sent."""
        if rate is None:
            return 1.0
        if self._source.trace is None:
            return rate
        if self.own_rate is None:
            raise ConfigError("requests that all arrive at one time have no rate to change")
        return rate / self.own_rate

    def first(self, num: int, rate: float | None = None) -> list[Arrival]:
        """`num` requests, fewer where a trace has fewer, at `rate` a second on average: over the
        whole trace, or as drawn. None: at the trace's own times.
        """
        if rate is not None and not 0.0 < rate < math.inf:
            raise ConfigError(f"--rate {rate:g}: use a number above 0 of requests a second")
        chosen = self.some(num)
        if rate is None:
            if self._source.trace is None:
                raise ConfigError("a workload has no rate of its own: use --rate")
            return chosen
        divisor = self.times_divided_by(rate)
        return [one._replace(arrived_s=one.arrived_s / divisor) for one in chosen]

    def some(self, num: int) -> list[Arrival]:
        """The same requests for those who do not send by their times, which mean nothing here."""
        if self._source.trace is None and len(self._all) < num:
            self._all = self._generated(num)
        return self._all[:num]

    def _generated(self, num: int) -> list[Arrival]:
        """At least `num`, at one a second."""
        source, named = self._source, self._named
        wanted = max(num, MANY)
        fitting: list[Arrival] = []
        while len(fitting) < num:
            wanted = math.ceil(SPARE * wanted)
            workload = Workload(1.0, wanted, named.prompt, named.output, named.gaps, source.seed)
            drawn = generate(workload, NO_LIMIT)
            fitting = self._fitting(drawn)
        times = [one.arrived_s for one in drawn]
        return [one._replace(arrived_s=time_s) for one, time_s in zip(fitting, times, strict=False)]

    def _of_trace(self, path: Path) -> list[Arrival]:
        source = self._source
        rows = read_trace(path)
        if source.tick_s is not None:
            rows = spread_ticks(rows, source.tick_s, source.seed)
        if source.from_s > 0.0 or source.to_s < math.inf:
            rows = cut_window(rows, source.from_s, source.to_s)
        rows = self._fitting(thin(rows, source.share, source.seed))
        return [one._replace(arrived_s=one.arrived_s - rows[0].arrived_s) for one in rows]

    def _fitting(self, rows: list[Arrival]) -> list[Arrival]:
        if not rows:
            raise ConfigError("no request is left: keep a larger share of them")
        if self._source.divisor != 1.0:
            rows = scale_lengths(rows, self._source.divisor)
        if self._max_tokens is None:
            return rows
        fitting = fit_context(rows, self._max_tokens)
        self.dropped_share = 1.0 - len(fitting) / len(rows)
        return fitting


def described(
    source: Source, requests: Requests, chosen: list[Arrival], rate: float | None
) -> dict[str, object]:
    """What was done to the requests, asked for at `rate`, and what they look like: for reports."""
    numbers: Traffic = traffic(chosen)
    return {
        "workload": str(source.trace) if source.trace else source.workload,
        **{
            field.name: getattr(source, field.name)
            for field in dataclasses.fields(source)
            if field.name not in ("workload", "trace")
            and getattr(source, field.name) != field.default
        },
        "seed": source.seed,
        "dropped_share": requests.dropped_share,
        "times_divided_by": requests.times_divided_by(rate),
        **dataclasses.asdict(numbers),
    }
