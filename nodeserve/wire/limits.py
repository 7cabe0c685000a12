"""What one message may hold at most, by who sent it.

The bytes of a message are bounded before it is decoded, by its frame or its ring. These bound what
the bytes may become: an empty list is one byte on the wire and sixty in memory.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """All inclusive. Binary values may be as long as their message."""

    max_items: int  # in one array or map
    max_containers: int  # arrays and maps in a whole message, so it is also no deeper than that
    max_text_bytes: int  # in one string


# A Submit has six containers, of which two may be long, and one long text: all of them are checked
# again by value (types.MAX_LISTED, MAX_CONSTRAINT_BYTES).
OF_A_CLIENT = Limits(max_items=4096, max_containers=16, max_text_bytes=1 << 17)
# Tokens has a container for each request, and one for each token with log probabilities.
OF_THE_SERVER = Limits(max_items=1 << 20, max_containers=1 << 20, max_text_bytes=1 << 20)
# A StepDone or Prefill has a few for each sequence of a step.
OF_A_RING = Limits(max_items=1 << 16, max_containers=1 << 18, max_text_bytes=1 << 20)
MAX_EXTENSION_BYTES = 12  # no message uses msgpack's extension types
