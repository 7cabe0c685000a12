"""Quantile grids: distributions told by some points of their inverse, drawn straight between them.

The numbers are statistics of public traces, not the traces: percentiles of Azure LLM inference 2023
(conversation and code), arXiv summarisation lengths without answers above 1,024 tokens, Mooncake
conversation, ServeGen's DeepSeek-R1 clients, first turns of ShareGPT (Llama-3 tokens, filtered as
vLLM's benchmark does), and HumanEval (Llama-3 tokens). Inputs and outputs are drawn independently.
Means of a grid are up to 9 % above those of its source, since the line over the last percent lies
above the true tail; outputs of `code` 14 %.
"""

from bisect import bisect_right
from dataclasses import dataclass
from random import Random

LEVELS = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class Grid:
    """`values[i]` is the quantile at `levels[i]`; both ascend, levels from 0 to 1."""

    values: tuple[float, ...]
    levels: tuple[float, ...] = LEVELS

    def quantile(self, level: float) -> float:
        """The value below which the share `level` (0 to 1) of the draws lies."""
        right = min(bisect_right(self.levels, level), len(self.levels) - 1)
        low, high = self.levels[right - 1], self.levels[right]
        share = (level - low) / (high - low)
        return self.values[right - 1] + share * (self.values[right] - self.values[right - 1])

    def draw(self, random: Random) -> int:
        """A length: whole, at least 1."""
        return max(1, round(self.quantile(random.random())))

    @property
    def mean(self) -> float:
        return sum(
            (high - low) * (self.values[place] + self.values[place + 1]) / 2
            for place, (low, high) in enumerate(zip(self.levels, self.levels[1:], strict=False))
        )


CHAT_IN = Grid((2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 6179, 14050))
CHAT_OUT = Grid((7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 954, 1000))
CODE_IN = Grid((3, 17, 75, 147, 578, 1469, 2744, 5188, 7303, 7436, 7437, 7437))
CODE_OUT = Grid((6, 6, 6, 7, 9, 13, 24, 55, 90, 251, 825, 1899))
SUMMARY_IN = Grid((1, 610, 1107, 1471, 2089, 2771, 3388, 3710, 3816, 3936, 4010, 4039))
SUMMARY_OUT = Grid((5, 36, 60, 77, 113, 163, 230, 318, 392, 664, 957, 1022))
LONG_CHAT_IN = Grid((891, 894, 901, 964, 2306, 6909, 15367, 27367, 39550, 85400, 121301, 126195))
LONG_CHAT_OUT = Grid((1, 3, 10, 24, 156, 350, 472, 597, 698, 1119, 2000, 2000))
REASONING_IN = Grid((4, 7, 11, 22, 83, 278, 1024, 6852, 17246, 29616, 36216, 40708))
REASONING_OUT = Grid((55, 141, 226, 277, 411, 703, 1156, 1820, 3703, 13281, 21202, 25038))
SHAREGPT_IN = Grid((4, 5, 8, 10, 20, 102, 362, 601, 747, 882, 1009, 1021))
SHAREGPT_OUT = Grid((4, 4, 8, 11, 26, 136, 319, 494, 640, 770, 1416, 1816))
HUMANEVAL_IN = Grid((39, 41, 52, 67, 88, 118, 156, 227, 271, 312, 380, 392))
HUMANEVAL_OUT = Grid((5, 6, 9, 14, 26, 46, 73, 107, 120, 157, 228, 240))

# Gaps of Azure's code trace over their mean. Arrivals come in bursts: a quarter of the gaps is next
# to nothing, one in a thousand is two hundred times the mean. CV 12.4, the trace's own is 13.2.
CODE_GAPS = Grid(
    (0.0, 0.0, 0.0051, 0.1642, 0.2669, 0.7006, 1.0291, 2.0497, 5.6585, 25.61, 203.3, 557.3),
    (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0),
)
