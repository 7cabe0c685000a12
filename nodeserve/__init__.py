"""nodeserve: goodput-first LLM serving on one node, prefill and decode apart.

Importing the package loads neither torch nor the C++ extension, and needs no running server.
"""

__version__ = "0.1.0"
