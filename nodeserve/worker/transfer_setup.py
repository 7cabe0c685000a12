"""Makes a GPU worker's transfer: which way its pages leave, and what that way needs.

The workers of a team offer pages by the same ids, so all of them take the same way, and through the
host all have as many slots.
"""

import mmap
from typing import Any

from nodeserve.config import WorkerSpec
from nodeserve.errors import ConfigError
from nodeserve.policy.blocks import blocks_for
from nodeserve.worker.contract import Agree
from nodeserve.worker.gpu_runtime import Runtime
from nodeserve.worker.offers import DirectOffers, HostOffers, NoOffers, Offers
from nodeserve.worker.page_copies import Blocks, PageCopies
from nodeserve.worker.pages import free_bytes, make_pool
from nodeserve.worker.peers import pinned
from nodeserve.worker.routes import IPC, Route, choose_route, pack_handle, through_host
from nodeserve.worker.sizing import num_slots_for
from nodeserve.worker.transfer_cuda import CudaTransfer
from nodeserve.worker.watcher import Watcher


def make_transfer(
    spec: WorkerSpec, runtime: Runtime, pool: Any, block_bytes: int, agree: Agree
) -> tuple[CudaTransfer, Route]:
    """pool: our pages, a _cuda.Pool. ConfigError where --handoff asks for what is not there."""
    cuda, device = runtime.cuda, runtime.index
    watcher = Watcher("copies", runtime.thread_begins)
    own = Blocks(pool.address, pool.num_bytes // block_bytes, block_bytes)
    # Pulls and offers have a stream each: they go in different directions and end apart.
    copies = PageCopies(cuda, device, watcher)
    offers, route = _make_offers(spec, runtime, pool, own, copies, agree)
    pulls = PageCopies(cuda, device, watcher)
    return CudaTransfer(cuda, device, own, pulls, offers, watcher), route


def _make_offers(
    spec: WorkerSpec, runtime: Runtime, pool: Any, own: Blocks, copies: PageCopies, agree: Agree
) -> tuple[Offers, Route]:
    """Only prefill workers have pages that others want."""
    if spec.role != "prefill":
        return NoOffers(), Route("none", "pulls only")
    direct, obstacle = _try_direct(runtime, pool)
    readers = [
        runtime.cuda.can_access_peer(place, runtime.index) for place in range(1, len(spec.gpus))
    ]
    route = choose_route(spec.handoff, spec.gpus, readers, obstacle)
    all_direct = agree("direct handoff", int(route.kind == IPC))
    if direct is not None and all_direct:
        return direct, route
    if route.kind == IPC:
        route = through_host("another worker of this instance has no other way")
    return _host_offers(spec, runtime, own, copies, agree), route


def _try_direct(runtime: Runtime, pool: Any) -> tuple[DirectOffers | None, str | None]:
    """Offers of the pool itself, or why its memory cannot be shown to another process."""
    cuda, device = runtime.cuda, runtime.index
    try:
        stream = cuda.Stream(device)
        written = cuda.Event(device, interprocess=True)
        handle = pack_handle(pool.handle(), written.handle())
    except cuda.CudaError as problem:
        return None, f"this GPU's memory cannot be exported ({problem})"
    return DirectOffers(written, stream, pool.num_bytes, handle), None


def _host_offers(
    spec: WorkerSpec, runtime: Runtime, own: Blocks, copies: PageCopies, agree: Agree
) -> HostOffers:
    least = blocks_for(spec.max_model_len, spec.block_size)
    num_workers = len(spec.gpus) * spec.gpu_share  # or fewer, where some GPUs are shared
    room = num_slots_for(own.block_bytes, least, free_bytes(spec.pages_fd), num_workers)
    num_slots = agree("handoff slots", room)
    num_bytes = num_slots * own.block_bytes
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE  # pinning goes by the system's pages
    try:
        segment = make_pool(spec.pages_fd, size)
    except ConfigError:
        raise ConfigError(
            f"pages leave this GPU through shared memory, which needs {size} bytes for one sequence"
            f" of the full context and has {free_bytes(spec.pages_fd):.0f}: give more (docker:"
            " --shm-size) or a smaller --max-model-len"
        ) from None
    pages = pinned(runtime.cuda, runtime.index, segment, size)
    blocks = Blocks(pages.address, num_slots, own.block_bytes)
    return HostOffers(copies, own, blocks, size, keep=(segment, pages))
