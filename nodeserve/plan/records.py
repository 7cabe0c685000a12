"""What goes into a simulation and what comes out."""

from dataclasses import dataclass, field
from typing import NamedTuple

from nodeserve.layout import Shape, parse_layout
from nodeserve.policy.cost import RankWork
from nodeserve.policy.flow import FlowOptions
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.profiles import find_profile
from nodeserve.policy.units import DispatchOptions
from nodeserve.types import Role, Timings


class Arrival(NamedTuple):
    """One request of a trace."""

    arrived_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    priority: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    block_ids: tuple[int, ...] = ()  # who has the same begins with the same tokens


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong in a run."""

    report_loss: float = 0.0  # share of prefill passes of whose end the policy is never told
    kill_instance: int | None = None  # its place in Scenario.instances
    kill_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Engine:
    """Ways in which a simulated engine may differ from ours: for baselines."""

    delay_passes: int = 0  # a prefill pass waits until all ranks have work, for so many ticks
    delay_tick_s: float = 0.005
    prefill_first: bool = False  # mixed: a pass is all prefill, while anybody waits, or all decode


class Simulated(NamedTuple):
    """One instance of a layout as it is simulated."""

    role: Role
    shape: Shape
    profile: Profile


@dataclass(frozen=True, slots=True)
class Scenario:
    """A node to simulate. The budget and the number of sequences in `dispatch` are also those of
    its ranks, whatever the profile suggests."""

    layout: str
    profile: str | Profile | Family
    dispatch: DispatchOptions = field(default_factory=DispatchOptions)
    decode_allocation: str = "cost"
    flow: FlowOptions | None = None  # None: whatever comes is taken
    block_size: int = 16  # tokens
    seed: int = 0
    noise: float | None = None  # standard deviation of a pass's factor; None: the profile's
    transit_s: float | None = None  # one way, coordinator to worker and back; None: the profile's
    faults: Faults = field(default_factory=Faults)
    engine: Engine = field(default_factory=Engine)

    @property
    def resolved_profile(self) -> Profile:
        """That of the first instance. ConfigError if no profile has this name or shape."""
        return self.instances[0].profile

    @property
    def message_s(self) -> float:
        """What a message takes."""
        return self.resolved_profile.transit_s if self.transit_s is None else self.transit_s

    @property
    def instances(self) -> tuple[Simulated, ...]:
        """Role, shape and profile of each instance of the layout, in its order."""
        return tuple(
            Simulated(group.role, group.shape, self._profile_of(group.shape))
            for group in parse_layout(self.layout).instances
        )

    def _profile_of(self, shape: Shape) -> Profile:
        found = find_profile(self.profile) if isinstance(self.profile, str) else self.profile
        return found.of(shape)


@dataclass(slots=True)
class Served:
    """One request's life; times in seconds since the start."""

    arrival: Arrival
    timings: Timings
    ended_s: float
    outcome: str  # stop, length, or the code of an error
    tpot_s: float | None  # with two output tokens or more
    refused_for: str = ""  # ttft or tpot: the limit for which it was refused, if it was


class Pass(NamedTuple):
    """One pass of one instance. Where several are under way in its stages, each begins for our
    purposes when the one before it ended, so that they take all of the instance's time together."""

    instance: int  # its place in Scenario.instances
    began_s: float
    seconds: float
    gap_s: float  # since the pass before ended
    ranks: tuple[RankWork, ...]


@dataclass(slots=True)
class Outcome:
    """A run: requests in order of arrival, passes in order of their ends."""

    served: list[Served]
    passes: list[Pass]
    duration_s: float
