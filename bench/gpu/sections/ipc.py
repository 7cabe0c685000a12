"""Pages from another process's pool: right in every block, generation and shard shape.

An owner process makes a pool for each rank of the source, with a known value at every place. This
one pulls random pairs of blocks into a rank of the target and compares all of it with a slice of
the whole model's tensor: what had to come is there, and what had to stay is untouched. Then the
owner starts anew with other values, as after a restart, and all is opened again.
"""

import ctypes
import mmap
import random
from dataclasses import dataclass

import torch

from bench.gpu.bed import Bed
from bench.gpu.extension import extension
from bench.gpu.lines import check
from bench.gpu.memory import settle, view
from bench.gpu.peers import Made, Owner, owner
from bench.gpu.shards import POISON, Rank, Whole, ranks_of, values
from nodeserve.policy.copy_plan import CopyRun, PageGeometry, PageShard, pulls, shards

DEGREES = ((1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (8, 8), (1, 8), (16, 4), (4, 16))
METHODS = ("kernel", "batch", "auto")
SEED = 7


def run(bed: Bed) -> None:
    whole = Whole(num_layers=4, num_heads=8, block_size=16, head_dim=bed.pick(128, 16))
    num_blocks = bed.pick(96, 12)
    reader = Reader(bed, whole, num_blocks)
    problem = through_host(bed, whole, num_blocks)
    bed.sheet.add(check("through pinned host memory, every block", not problem, problem))
    with owner(bed.rehearsal) as first:
        refusal = reader.refusal(first)
        bed.sheet.keep(ipc_opens=not refusal)  # later sections take the other road without it
        bed.sheet.add(check("a pool of another process opens", not refusal, refusal))
        if refusal:
            return
        for degrees in DEGREES:
            problem = reader.pull_all(first, degrees, generation=1)
            name = f"pull, tensor parallel {degrees[0]} to {degrees[1]}, every block"
            bed.sheet.add(check(name, not problem, problem))
        problem = reader.pull_all(first, (1, 1), generation=2)
        bed.sheet.add(check("the pool is made anew, a second generation", not problem, problem))
    with owner(bed.rehearsal) as second:
        problem = reader.pull_all(second, (1, 1), generation=3)
        bed.sheet.add(check("the owner is another process after a restart", not problem, problem))


@dataclass
class Reader:
    """The process that pulls; `pull_all` gives "" or what was wrong."""

    bed: Bed
    whole: Whole
    num_blocks: int

    def __post_init__(self) -> None:
        self.cuda = extension(self.bed.rehearsal)
        self.random = random.Random(SEED)

    def refusal(self, peer: Owner) -> str:
        """CUDA's words where this machine lets no process open another's memory, else ""."""
        made = peer.make(self.whole, ranks_of(self.whole, 1), self.num_blocks, 0)
        [exported] = made.pools
        try:
            event = self.cuda.Event.open(0, made.event)
            pool = self.cuda.PeerPool(0, exported.handle, exported.num_bytes)
        except self.cuda.CudaError as problem:
            return str(problem)
        finally:
            peer.close()
        for one in (pool, event):
            one.close()
        return ""

    def pull_all(self, peer: Owner, degrees: tuple[int, int], generation: int) -> str:
        """Every rank of the target from all source ranks that hold some of its heads."""
        sources = ranks_of(self.whole, degrees[0])
        made = peer.make(self.whole, sources, self.num_blocks, generation)
        problems = [
            self.pull(made, degrees, place, generation, method)
            for place in range(degrees[1])
            for method in METHODS
        ]
        peer.close()
        return next(filter(None, problems), "")

    def pull(
        self, made: Made, degrees: tuple[int, int], place: int, generation: int, method: str
    ) -> str:
        """One rank of the target, as its worker would do it."""
        target, rank = page_shards(self.whole, degrees[1])[place], ranks_of(self.whole, degrees[1])
        sources, pairs = page_shards(self.whole, degrees[0]), self.pairs()
        pool = self.cuda.Pool(0, self.num_blocks * target.block_bytes)
        held = view(pool.address, pool.num_bytes, self.bed.device).view(torch.int16)
        held.fill_(POISON)
        settle(self.bed.device)
        stream = self.cuda.Stream(0)
        event = self.cuda.Event.open(0, made.event)
        event.make_wait(stream.handle)
        peers = []
        for pull in pulls(target, sources, first=place):
            exported, source = made.pools[pull.source_index], sources[pull.source_index]
            peers.append(self.cuda.PeerPool(0, exported.handle, exported.num_bytes))
            self.cuda.copy_pages(
                pool.address,
                pool.num_bytes,
                peers[-1].address,
                peers[-1].num_bytes,
                pairs.numpy(),
                as_array(pull.runs).numpy(),
                target_stride=target.block_bytes,
                source_stride=source.block_bytes,
                stream=stream.handle,
                method=method,
            )
        stream.synchronize()
        problem = self.compare(held, pairs, rank[place], generation)
        del held
        for one in (event, stream, *peers, pool):
            one.close()
        return f"rank {place} by {method}: {problem}" if problem else ""

    def pairs(self) -> torch.Tensor:
        """[n, 2] int32: about two thirds of the blocks, to other places."""
        count = 2 * self.num_blocks // 3
        targets, sources = (
            self.random.sample(range(self.num_blocks), self.num_blocks)[:count] for _ in range(2)
        )
        return torch.tensor(list(zip(targets, sources, strict=True)), dtype=torch.int32)

    def compare(self, held: torch.Tensor, pairs: torch.Tensor, rank: Rank, generation: int) -> str:
        """The whole pool against what it must hold now."""
        device, order = self.bed.device, pairs.long()
        wanted_blocks = values(self.whole, rank, order[:, 1], generation, device)
        wanted = torch.full((self.num_blocks, *wanted_blocks.shape[1:]), POISON, dtype=torch.int16)
        wanted = wanted.to(device)
        wanted[order[:, 0].to(device)] = wanted_blocks
        return difference(held.view(wanted.shape), wanted)


def difference(held: torch.Tensor, wanted: torch.Tensor) -> str:
    wrong = (held != wanted).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return f"{len(wrong)} of {len(wanted)} blocks are wrong, first {wrong[:5]}" if wrong else ""


def page_shards(whole: Whole, degree: int) -> tuple[PageShard, ...]:
    """The ranks of an instance in the copy plan's words."""
    geometry = PageGeometry(
        whole.num_layers, whole.num_heads, whole.block_size, whole.head_dim, value_bytes=2
    )
    return shards(geometry, tp=degree)


def as_array(runs: tuple[CopyRun, ...]) -> torch.Tensor:
    """[m, 3] int64, as `copy_pages` takes them."""
    return torch.tensor([[r.target, r.source, r.num_bytes] for r in runs], dtype=torch.int64)


def through_host(bed: Bed, whole: Whole, num_blocks: int) -> str:
    """Out of a pool into pinned memory, and from there into another pool."""
    cuda, [rank] = extension(bed.rehearsal), ranks_of(whole, 1)
    num_bytes = num_blocks * rank.block_bytes(whole)
    mapping = mmap.mmap(-1, num_bytes)
    pinned = cuda.HostPages(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), num_bytes)
    pools = [cuda.Pool(0, num_bytes) for _ in range(2)]
    source, target = (view(p.address, num_bytes, bed.device).view(torch.int16) for p in pools)
    wanted = values(whole, rank, torch.arange(num_blocks), 4, bed.device)
    source.view(wanted.shape).copy_(wanted)
    target.fill_(POISON)
    settle(bed.device)
    there = torch.randperm(num_blocks, dtype=torch.int32)
    back = torch.stack([torch.arange(num_blocks, dtype=torch.int32), there], dim=1)
    out = torch.stack([there, torch.arange(num_blocks, dtype=torch.int32)], dim=1)
    stream, stride = cuda.Stream(0), rank.block_bytes(whole)
    for to, start, pairs in ((pinned, pools[0], out), (pools[1], pinned, back)):
        cuda.copy_pages(
            to.address,
            num_bytes,
            start.address,
            num_bytes,
            pairs.numpy(),
            torch.tensor([[0, 0, stride]]).numpy(),
            target_stride=stride,
            source_stride=stride,
            stream=stream.handle,
        )
    stream.synchronize()
    problem = difference(target.view(wanted.shape), wanted)
    del source, target
    for one in (stream, pinned, *pools):
        one.close()
    return problem
