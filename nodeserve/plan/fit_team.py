"""What workers of a team tell each other, from passes of two tensor ranks.

The formula of policy/shapes.py says what halves of a pass take if messages cost nothing. What
measured passes take beyond that is dealt to its two terms: latency, which every pass pays for each
all-reduce, and bytes, which grow with the rows. Errors count as shares of what a pass took, and
neither term is negative.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low

from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.plan.fit import Timed, alike
from nodeserve.policy.profile import Profile
from nodeserve.policy.sizes import Anatomy

PAIR = Shape(tp=2)
FREE = 1e18  # bytes a second that take no time

Term = tuple[float, float, float]  # of a pass: hops, bytes, seconds beyond its halves; as shares


def fit_team(profile: Profile, passes: Sequence[Timed], gap_s: float = 0.0) -> Anatomy:
    """The profile's anatomy with the latency and the rate of sums in shared memory that these
    passes of two tensor ranks show, each followed by a gap; ConfigError without any pass."""
    anatomy = profile.anatomy
    assert anatomy is not None, "shapes follow from it"
    if not passes:
        raise ConfigError("no pass of two workers was measured")
    free, hop, byte = (
        replace(profile, anatomy=replace(anatomy, hop_s=hop_s, sum_bytes_per_s=rate)).of(PAIR).cost
        for hop_s, rate in ((0.0, FREE), (1.0, FREE), (0.0, 1.0))
    )
    hops = hop.decode_fix_s - free.decode_fix_s
    row_bytes = byte.token_s - free.token_s
    terms: list[Term] = []
    for group in alike(passes):
        usual = median_low(one.seconds for one in group)
        work = next(one.work for one in group if one.seconds == usual)
        whole_s = usual + gap_s
        rows = work.prefill_tokens + work.num_decodes
        beyond_s = whole_s - free.pass_s([work])
        terms.append((hops / whole_s, rows * row_bytes / whole_s, beyond_s / whole_s))
    hop_s, byte_s = _least_squares(terms)
    return replace(anatomy, hop_s=hop_s, sum_bytes_per_s=1.0 / max(byte_s, 1.0 / FREE))


def _least_squares(terms: Sequence[Term]) -> tuple[float, float]:
    """Seconds of a hop and of a byte; where one would be negative it is 0, and the other alone."""
    aa = sum(a * a for a, _, _ in terms)
    ab = sum(a * b for a, b, _ in terms)
    bb = sum(b * b for _, b, _ in terms)
    ar = sum(a * r for a, _, r in terms)
    br = sum(b * r for _, b, r in terms)
    found = [(max(0.0, ar / aa), 0.0), (0.0, max(0.0, br / bb))]
    if (left := aa * bb - ab * ab) > 1e-9 * aa * bb:
        both = (ar * bb - br * ab) / left, (br * aa - ar * ab) / left
        if min(both) >= 0.0:
            return both
    return min(found, key=lambda one: sum((a * one[0] + b * one[1] - r) ** 2 for a, b, r in terms))
