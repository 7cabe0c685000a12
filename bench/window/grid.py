"""What is compared: the eight arms, the shapes of nodes, loads, arrivals and lengths.

Requests have one output token and end with it: nothing but prefill decides their time to first
token, and a decode instance is there only because a layout must have one.
"""

from dataclasses import dataclass

from nodeserve.plan.records import Engine, Faults
from nodeserve.policy.profiles import PROFILES
from nodeserve.policy.units import DispatchOptions

PROFILE = PROFILES["moe-ep8"]
LOADS = (0.2, 0.4, 0.6, 0.8, 0.9)  # of what arm C sustains
SEEDS = (11, 23, 37, 53, 71)
ARRIVALS = ("poisson", "gamma:3")
LENGTHS = ("fixed:1500", "lognormal:1500", "pareto:1500")
WORKLOAD = (ARRIVALS[0], LENGTHS[1])  # what pictures, stages and limits are shown for
MEAN_LIMIT_S, P99_LIMIT_S = 1.0, 2.0  # of TTFT
REPORT_LOSS = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """So many prefill instances of so many data-parallel ranks."""

    instances: int
    ranks: int

    @property
    def layout(self) -> str:
        return f"{self.instances}p:ep{self.ranks},1d"

    def __str__(self) -> str:
        return f"{self.instances}x{self.ranks}"


SHAPES = (Shape(4, 8), Shape(2, 4), Shape(4, 2), Shape(1, 8))


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to dispatch. A faulty one loses reports, and an instance where there are several."""

    letter: str
    title: str
    admission: str
    prefill_allocation: str = "water-filling"
    engine: Engine = Engine()
    faulty: bool = False

    @property
    def dispatch(self) -> DispatchOptions:
        return DispatchOptions(
            admission=self.admission,
            prefill_allocation=self.prefill_allocation,
            budget=PROFILE.max_num_batched_tokens,
            max_num_seqs=PROFILE.max_num_seqs,
        )

    def faults(self, shape: Shape, kill_at_s: float) -> Faults:
        if not self.faulty:
            return Faults()
        return Faults(REPORT_LOSS, 0 if shape.instances > 1 else None, kill_at_s)


ARMS = (
    Arm("A", "round-robin", "round-robin"),
    Arm("B", "fewest requests", "fewest-requests"),
    Arm("C", "shortest queue", "shortest-queue"),
    Arm("D", "pull, no timer", "pull"),
    Arm("E", "as C, the engine delays", "shortest-queue", engine=Engine(delay_passes=30)),
    Arm("F", "as G, ranks in turn", "staggered", prefill_allocation="round-robin"),
    Arm("G", "staggered", "staggered"),
    Arm("H", "as G, with faults", "staggered", faulty=True),
)
BY_LETTER = {arm.letter: arm for arm in ARMS}
IMMEDIATE = "ABCE"  # dispatch on arrival: claims are against the best of these
SOUND = "ABCDEFG"  # same node, nothing broken: G may be worse than none of them


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the grid."""

    shape: Shape
    arrivals: str
    lengths: str
    load: float

    def __str__(self) -> str:
        return f"{self.shape} {self.arrivals} {self.lengths} {self.load:.0%}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of the grid to run. `limit_arms`: whose highest rate under a limit is searched."""

    name: str
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    requests_per_rank: int  # of a run: all shapes run for about the same time
    limit_shapes: tuple[Shape, ...]
    limit_arms: str = SOUND
    talks: bool = True  # says how far it is

    def num_requests(self, shape: Shape) -> int:
        """Of one run."""
        return self.requests_per_rank * shape.instances * shape.ranks


def points(
    shapes: tuple[Shape, ...],
    arrivals: tuple[str, ...],
    lengths: tuple[str, ...],
    loads: tuple[float, ...],
) -> tuple[Point, ...]:
    return tuple(
        Point(shape, kind, length, load)
        for shape in shapes
        for kind in arrivals
        for length in lengths
        for load in loads
    )


POISSON, LOGNORMAL = (WORKLOAD[0],), (WORKLOAD[1],)
FULL = Plan("full", points(SHAPES, ARRIVALS, LENGTHS, LOADS), SEEDS, 100, SHAPES)
QUICK = Plan(
    "quick",
    points(SHAPES, POISSON, LOGNORMAL, LOADS[::2])
    + points(SHAPES[:1], ARRIVALS[1:], LENGTHS[2:], LOADS[2:3]),
    SEEDS[:3],
    60,
    SHAPES[:1],
)
SMOKE = Plan(
    "smoke", points(SHAPES[1:2], POISSON, LOGNORMAL, LOADS[2:3]), SEEDS[:2], 20, (), talks=False
)
PLANS = {plan.name: plan for plan in (FULL, QUICK, SMOKE)}
