"""The choice of a token per row on the device, by the rules of `worker/sampler.py`.

One program does one row, so its token does not depend on what shares the batch. It reads the row
once for the most likely token. A row that is drawn gets its weights, exp of the logit below the
highest, written over its logits; top-k, top-p and min-p become one lowest weight; the token is
where the sum of the kept weights, in the order of token ids, passes a random number's share of the
total.

The lowest weight is sought by halving a range of floats, which sort like their bits. Each pass also
finds the nearest weights on both sides of the middle, and the range shrinks to those: so there are
about as many passes as the logarithm of the number of weights, and not 31.
"""

import torch
import triton
import triton.language as tl

PARAMETERS = 5  # of a row: temperature (0: the most likely), top_k (0: all), top_p, min_p, number
MAX_TILE = 8192
ONE_BITS = tl.constexpr(0x3F800000)  # 1.0 as float32, the highest weight


@triton.jit
def mass_above(
    weights: tl.tensor,  # [VOCAB] float32
    lowest: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Float64 sum of the weights that are not below `lowest`."""
    lane = tl.arange(0, TILE)
    lanes = tl.zeros([TILE], tl.float32)
    for start in range(0, VOCAB, TILE):
        w = tl.load(weights + start + lane, mask=start + lane < VOCAB, other=0.0)
        lanes += tl.where(w >= lowest, w, 0.0)
    return tl.sum(lanes.to(tl.float64), axis=0)


@triton.jit
def seek(
    weights: tl.tensor,  # [VOCAB] float32, the highest 1
    floor: tl.tensor,  # float32 at which the measure is enough
    wanted: tl.tensor,  # float64 above 0
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The largest weight w at which the weights from w up are enough: by their sum or their number.

    It lies between low and high, which are weights, or the ends they started from.
    """
    lane = tl.arange(0, TILE)
    low = floor.to(tl.int32, bitcast=True)
    high = low * 0 + ONE_BITS
    while low < high:
        middle = low + (high - low + 1) // 2
        bound = middle.to(tl.float32, bitcast=True)  # above 0
        lanes = tl.zeros([TILE], tl.float32)
        least = tl.full([TILE], 2.0, tl.float32)
        most = tl.zeros([TILE], tl.float32)
        for start in range(0, VOCAB, TILE):
            w = tl.load(weights + start + lane, mask=start + lane < VOCAB, other=0.0)
            kept = w >= bound
            if BY_MASS:
                lanes += tl.where(kept, w, 0.0)
            else:
                lanes += tl.where(kept, 1.0, 0.0)
            least = tl.minimum(least, tl.where(kept, w, 2.0))
            most = tl.maximum(most, tl.where(kept, 0.0, w))
        enough = tl.sum(lanes.to(tl.float64), axis=0) >= wanted
        above = tl.min(least, axis=0).to(tl.int32, bitcast=True)
        below = tl.max(most, axis=0).to(tl.int32, bitcast=True)
        high = tl.where(enough, high, tl.maximum(below, low))
        low = tl.where(enough, above, low)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def inverse_cdf(
    weights: tl.tensor,  # [VOCAB] float32
    lowest: tl.tensor,
    number: tl.tensor,  # float64 in [0, 1)
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,  # up to a power of two
) -> tl.tensor:
    """The token at `number` of the way through the kept weights; never one that is not kept."""
    lane = tl.arange(0, TILE)
    tile = tl.arange(0, NUM_TILES)
    sums = tl.zeros([NUM_TILES], tl.float64)
    for start in range(0, VOCAB, TILE):
        w = tl.load(weights + start + lane, mask=start + lane < VOCAB, other=0.0)
        kept = tl.where(w >= lowest, w, 0.0).to(tl.float64)
        sums = tl.where(tile == start // TILE, tl.sum(kept, axis=0), sums)
    ends = tl.cumsum(sums, axis=0)
    target = number * tl.sum(sums, axis=0)
    passed = tl.sum((ends <= target).to(tl.int32), axis=0)
    found = tl.minimum(passed, tl.max(tl.where(sums > 0.0, tile, 0), axis=0))
    before = tl.sum(tl.where(tile == found, ends - sums, 0.0), axis=0)

    at = found * TILE + lane
    w = tl.load(weights + at, mask=at < VOCAB, other=0.0)
    kept = tl.where(w >= lowest, w, 0.0).to(tl.float64)
    passed = tl.sum((tl.cumsum(kept, axis=0) <= target - before).to(tl.int32), axis=0)
    return found * TILE + tl.minimum(passed, tl.max(tl.where(kept > 0.0, lane, 0), axis=0))


@triton.jit
def choose_kernel(
    logits: tl.tensor,  # [rows, VOCAB] float32, written over where a row is drawn
    parameters: tl.tensor,  # [rows, PARAMETERS] float64
    tokens: tl.tensor,  # [rows] int32, written
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    DRAW: tl.constexpr,  # some row is drawn
    PARAMETERS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    own = logits + row * VOCAB
    highest = tl.full([TILE], float("-inf"), tl.float32)
    place = tl.zeros([TILE], tl.int32)
    for start in range(0, VOCAB, TILE):
        x = tl.load(own + start + lane, mask=start + lane < VOCAB, other=float("-inf"))
        place = tl.where(x > highest, start + lane, place)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, axis=0)
    token = tl.min(tl.where(highest == top, place, VOCAB - 1), axis=0)
    if DRAW:
        mine = parameters + row * PARAMETERS
        temperature = tl.load(mine).to(tl.float32)
        if temperature > 0.0:
            for start in range(0, VOCAB, TILE):
                inside = start + lane < VOCAB
                x = tl.load(own + start + lane, mask=inside, other=float("-inf"))
                tl.store(own + start + lane, tl.exp(tl.div_rn(x - top, temperature)), mask=inside)
            tl.debug_barrier()  # the weights are read by other threads than wrote them
            lowest = temperature * 0.0
            top_k = tl.load(mine + 1)
            if (top_k > 0.0) & (top_k < VOCAB):
                lowest = seek(own, lowest, top_k, False, VOCAB, TILE)
            top_p = tl.load(mine + 2)
            if top_p < 1.0:
                wanted = top_p * mass_above(own, lowest, VOCAB, TILE)
                lowest = seek(own, lowest, wanted, True, VOCAB, TILE)
            lowest = tl.maximum(lowest, tl.load(mine + 3).to(tl.float32))
            token = inverse_cdf(own, lowest, tl.load(mine + 4), VOCAB, TILE, NUM_TILES)
    tl.store(tokens + row, token)


def choose(logits: torch.Tensor, parameters: torch.Tensor | None, tokens: torch.Tensor) -> None:
    """logits [rows, vocab] float32, written over; tokens [rows] int32, written.

    parameters [rows, PARAMETERS] float64; None takes the most likely token of every row.
    """
    rows, vocab = logits.shape
    tile = min(triton.next_power_of_2(vocab), MAX_TILE)
    choose_kernel[(rows,)](
        logits,
        tokens if parameters is None else parameters,
        tokens,
        VOCAB=vocab,
        TILE=tile,
        NUM_TILES=triton.next_power_of_2(triton.cdiv(vocab, tile)),
        DRAW=parameters is not None,
        PARAMETERS=PARAMETERS,
        num_warps=min(max(tile // 512, 1), 16),
    )
