"""Stages that passes go through one behind the other."""

import math


class Pipeline:
    """Each stage works on one pass at a time, an equal share of it. So as many passes are under way
    as there are stages, and one that takes longer than its neighbours leaves stages waiting: behind
    it, and before those that are short."""

    def __init__(self, num_stages: int = 1) -> None:
        self.num_stages = num_stages
        self._free_s = [-math.inf] * num_stages

    @property
    def opens_s(self) -> float:
        """When the first stage can take the next pass."""
        return self._free_s[0]

    def run(self, now_s: float, seconds: float) -> float:
        """Send a pass through that takes so long alone; when it is out. O(stages)."""
        ends_s = now_s
        for stage, free_s in enumerate(self._free_s):
            ends_s = max(ends_s, free_s) + seconds / self.num_stages
            self._free_s[stage] = ends_s
        return ends_s
