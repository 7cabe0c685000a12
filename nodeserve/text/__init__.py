"""Text at the edge: tokenizer, chat template, incremental detokenising, stop strings.

Used by the client library and the gateway; the coordinator and the workers know token ids only.
Importing this is cheap: the tokenizer and template engines are imported by what first needs them.
"""

from nodeserve.text.stream import Detokenizer, StopStrings
from nodeserve.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings", "Tokenizer"]
