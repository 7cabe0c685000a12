"""nodeserve: goodput-first LLM serving on one node, prefill and decode apart.

    from nodeserve import Client, AsyncClient

Importing the package loads neither torch nor the C++ extension, and needs no running server.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodeserve.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """The clients, imported when first asked for: servers and workers do not need them."""
    if name in ("AsyncClient", "Client"):
        from nodeserve import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
