"""The options of a follower, and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from batchnorm_client.options import Cast
from batchnorm_client.wire.documents import MAX_ROWS

SHORTEST_INTERVAL: Final = 0.02
"""Seconds between two requests for the state, so that a layer with many commits does not take all the time."""

KEY_SECONDS: Final = 2700.0
"""How long a frame that may have been folded is sent again: less than the hour for which the service keeps receipts."""

INLINE_ELEMENTS: Final = 1 << 16
"""Batches up to this size are computed where they are, larger ones as the runtime says."""

EXIT_SECONDS: Final = 5.0
"""How long a process that exits tries to send what it has observed."""

_LONGEST_WAIT: Final = 30.0
_FRAME_BYTES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """The options of `Client.follow`, which describes them."""

    max_staleness: float | None
    sync_every: float
    sync_batches: int
    max_unsent: int
    timeout: float
    cast: Cast | None

    def __post_init__(self) -> None:
        if self.max_staleness is not None and not self.max_staleness > 0:
            raise ValueError("max_staleness must be more than 0 seconds, or None")
        if not (self.sync_every >= 0 and self.timeout >= 0):
            raise ValueError("sync_every and timeout must not be negative")
        if not 1 <= self.sync_batches <= self.max_unsent:
            raise ValueError("sync_batches must be at least 1, and at most max_unsent")

    @property
    def wait(self) -> float:
        """Seconds that a request for another state waits: a state is confirmed when its request was sent."""
        return min(_LONGEST_WAIT, (math.inf if self.max_staleness is None else self.max_staleness) / 3)

    def rows(self, channels: int) -> int:
        """How many batches of so many channels a frame may have."""
        return max(1, min(MAX_ROWS, _FRAME_BYTES // (16 * channels + 8)))

    def seconds_until_due(self, oldest: float | None, batches: int, now: float) -> float | None:
        """When the batches that wait are to be sent, the oldest of which was observed then; None for never."""
        if oldest is None:
            return None
        if batches >= self.sync_batches:
            return 0.0
        return None if self.sync_every == math.inf else oldest + self.sync_every - now
