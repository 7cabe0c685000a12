"""HTTP exchanges whose bytes get the time at which they were read. Needs aiohttp (bench extra)."""

import time
from collections.abc import Callable

import aiohttp
from yarl import URL

from nodeserve.errors import ConfigError, ConnectionLost, ProtocolError

IDLE_S = 1.0  # a connection unused for longer is not used again: servers close theirs after a few
OnBody = Callable[[bytes, float], None]  # bytes, and when they were read


def parse_url(url: str) -> URL:
    """Where "http://host:8000" or "https://host/prefix" is; a trailing /v1 may be there or not."""
    try:
        found = URL(url if "://" in url else f"http://{url}").with_user(None)
        usable = found.scheme in ("http", "https") and found.host
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"--url {url}: use http://HOST:PORT, such as http://127.0.0.1:8000")
    return found.with_path(found.path.rstrip("/").removesuffix("/v1").rstrip("/"))


class HttpClient:
    """One server, made in a running loop. A request has a connection at once, however many run, and
    is sent once: no redirects, no compression, nothing from the environment."""

    def __init__(self, base: URL, headers: dict[str, str], connect_timeout_s: float) -> None:
        self._base = base
        self._timeout_s = connect_timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S, ttl_dns_cache=None),
            headers={"Accept-Encoding": "identity", **headers},
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def exchange(
        self, method: str, route: str, on_body: OnBody, body: bytes | None = None
    ) -> int:
        """Send, and hand on the answer's body until it has ended; returns the status.

        ConnectionLost where nobody answers or the connection breaks, ProtocolError for what is no
        HTTP; whatever `on_body` raises ends the exchange.
        """
        url = self._base.joinpath(route)
        try:
            async with self._session.request(
                method, url, data=body, allow_redirects=False
            ) as response:
                async for data in response.content.iter_any():
                    on_body(data, time.perf_counter())
                return response.status
        except aiohttp.ConnectionTimeoutError:
            raise ConnectionLost(f"{self._base} did not answer in {self._timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as problem:
            raise ConnectionLost(
                f"no server at {self._base}: {problem.strerror or problem}"
            ) from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as problem:
            raise ConnectionLost(f"the connection ended before the answer did: {problem}") from None
        except aiohttp.ClientError as problem:
            raise ProtocolError(f"not an HTTP response: {problem}") from None

    async def close(self) -> None:
        await self._session.close()
