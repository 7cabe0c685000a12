"""Requests over the node's own socket."""

import time

from nodeserve.client import AsyncClient
from nodeserve.client.answer import read_timings
from nodeserve.client.connection import Arrival as Read
from nodeserve.client.connection import Event
from nodeserve.client.mailbox import Mailbox
from nodeserve.errors import ConfigError, InvalidRequest, from_code
from nodeserve.loadgen.prompts import token_ids
from nodeserve.loadgen.records import Job, Sample
from nodeserve.loadgen.targets import About, TargetOptions
from nodeserve.types import Sampling, sampling_to
from nodeserve.wire.messages import End

ID_BYTES = 4


class SocketTarget:
    """Prompts are token ids, answers greedy and as long as they were asked for."""

    def __init__(self, options: TargetOptions) -> None:
        if options.api == "chat":
            raise ConfigError("--api chat needs --url: over the socket prompts are token ids")
        if options.extra_body or options.headers:
            raise ConfigError("--extra-body and API keys are for --url")
        self._options = options
        self._client = AsyncClient(options.socket, connect_timeout_s=options.connect_timeout_s)
        self._vocab_size = 0

    async def open(self) -> About:
        server = await self._client.server()
        stats = await self._client.stats()
        self._vocab_size = self._options.vocab_size or server["vocab_size"]
        workers = stats.get("workers")
        return About(
            model=str(server["model"]),
            kind="nodeserve",
            num_workers=len(workers) if workers else None,
            max_model_len=server.get("max_model_len"),
        )

    def payload(self, job: Job, run: int) -> bytes:
        ids = token_ids(job, run, self._vocab_size, self._options.block_tokens)
        return ids.astype("<i4").tobytes()

    async def ask(self, job: Job, payload: bytes, sample: Sample, began_s: float) -> None:
        sampling = Sampling(
            max_tokens=job.arrival.num_output_tokens,
            temperature=0.0,
            ignore_eos=self._options.ignore_eos,
        )
        connection = await self._client.connection()
        sample.sent_s = time.perf_counter() - began_s
        request_id, mailbox = await connection.submit(
            payload, sampling_to(sampling), self._options.slo_ms or None, job.arrival.priority
        )
        try:
            end = await _read(mailbox, sample, began_s)
        finally:
            connection.forget(request_id)
        sample.told_prompt_tokens = end.usage.get("prompt_tokens")
        sample.told_output_tokens = end.usage.get("completion_tokens")
        sample.timings = read_timings(end.timings)
        sample.retry_after_s = end.retry_after_s
        if end.code is not None:
            raise from_code(end.code, end.message)
        if not sample.times:
            raise InvalidRequest("the answer has no token")

    async def close(self) -> None:
        await self._client.aclose()


async def _read(mailbox: Mailbox[Event], sample: Sample, began_s: float) -> End:
    """Note when tokens came; times are those at which their bytes were read."""
    while True:
        for event in await mailbox.take():
            if isinstance(event, Read):
                sample.times.append(event.at_s - began_s)
                sample.counts.append(len(event.token_ids) // ID_BYTES)
            elif isinstance(event, End):
                return event
            else:
                raise event
