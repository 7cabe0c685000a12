"""Whole lives of a Dispatcher: whatever happens around it, everybody is served, and once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodeserve.policy.units import ADMISSIONS, DispatchOptions
from tests.fakes.dispatch_instance import Request, World
from tests.fakes.dispatch_life import Death, Node
from tests.repeats import repeats

MAX_BUDGET = 100
MIN_BLOCKS = 12
instants = st.floats(0.0, 2.0)

worlds = st.builds(
    World,
    options=st.builds(
        DispatchOptions,
        admission=st.sampled_from((*ADMISSIONS, "staggered", "staggered")),
        window_s=st.none() | st.sampled_from((0.0, 0.05, 1.0)),
        window_k=st.sampled_from((1.0, 0.0, 0.5, 3.0)),
        prefill_allocation=st.sampled_from(("water-filling", "round-robin")),
        budget=st.sampled_from((16, 64, MAX_BUDGET)),
        max_num_seqs=st.sampled_from((16, 4, 1)),
    ),
    num_instances=st.integers(1, 4),
    decodes=st.booleans(),
    lags_s=st.lists(st.sampled_from((0.0, 0.003, 0.2)), min_size=1, max_size=3).map(tuple),
    num_blocks=st.sampled_from((200, 40, MIN_BLOCKS)),
    pass_s=st.sampled_from((0.1, 0.05)),
    token_s=st.sampled_from((0.0, 1e-3)),
    transit_s=st.sampled_from((0.002, 0.0, 0.05)),
    report_loss=st.sampled_from((0.0, 0.1, 0.7)),
)
requests = st.builds(
    Request,
    arrives_s=instants,
    num_tokens=st.integers(1, 3 * MAX_BUDGET),
    num_blocks=st.integers(1, MIN_BLOCKS),
    priority=st.integers(-1, 1),
    best_effort=st.booleans(),
    num_decodes=st.sampled_from((1, 0, 5, 30)),
    pinned_s=st.sampled_from((0.0, 0.05, 0.3, 3.0)),
    cancelled_after_s=st.none() | st.none() | instants,
)
few = st.lists(requests, min_size=1, max_size=6)
crowds = few | st.lists(requests, min_size=20, max_size=40)
# The first one always comes back, so that in the end somebody is left.
deaths = st.builds(
    Death, st.just(0), instants, st.sampled_from((0.5, 0.01, 3.0)), instants
) | st.builds(
    Death, st.integers(1, 3), instants, st.sampled_from((0.5, 0.01, 3.0)), st.none() | instants
)
seeds = st.integers(0, 7)

# No report ever comes, and nothing that happens later brings the news with it: the second request
# is served because a timer runs out, a probe is sent and its answer believed.
SILENT = World(
    options=DispatchOptions(),
    num_instances=1,
    decodes=False,
    lags_s=(0.0,),
    num_blocks=MIN_BLOCKS,
    pass_s=0.1,
    token_s=0.0,
    transit_s=0.002,
    report_loss=1.0,
)
UNHEARD = [Request(arrives_s, 10, num_decodes=0) for arrives_s in (0.0, 0.05)]


def live(world: World, arriving: list[Request], dying: list[Death], seed: int) -> None:
    """What holds at every single decision is checked by the node."""
    dying = [death for death in dying if death.instance < world.num_instances]
    node = Node(world, arriving, dying, seed)
    node.run()
    assert len(node.lives) == len(arriving)
    for life in node.lives:
        cancelled = life.request.cancelled_after_s is not None
        assert life.phase == "ended" or (cancelled and life.phase == "cancelled")
    assert not len(node.dispatcher) and not node.dispatcher.num_tokens
    for number, instance in enumerate(node.instances):
        assert node.dispatcher.instances[number].takes_part != instance.lost, "still a suspect"
    # Nothing is left behind that would keep the next one waiting.
    late = Request(node.clock.now_s, MAX_BUDGET, MIN_BLOCKS)
    assert node.serve(late).phase == "ended"
    if world.report_loss:
        node.hear_all()  # the last word of some ranks got lost
    for unit in node.units:
        if not node.instances[unit.instance].lost:
            account = unit.account
            held = account.outstanding_tokens, account.num_sequences
            assert (*held, account.free_blocks) == (0, 0, world.num_blocks)


@settings(max_examples=40, deadline=None)
@example(SILENT, UNHEARD, [], 0)
@given(worlds, few | crowds, st.lists(deaths, max_size=3), seeds)
def test_everybody_is_served_once(
    world: World, arriving: list[Request], dying: list[Death], seed: int
) -> None:
    live(world, arriving, dying, seed)


@pytest.mark.slow
@pytest.mark.repeats
@pytest.mark.timeout(400)  # a failure is made smaller for five minutes
@settings(max_examples=repeats(150, 2000), deadline=None)
@given(worlds, crowds, st.lists(deaths, max_size=5), seeds)
def test_everybody_is_served_once_in_many_lives(
    world: World, arriving: list[Request], dying: list[Death], seed: int
) -> None:
    live(world, arriving, dying, seed)
