"""Wrong tokens: counted, and answered late, so that guessing is slow."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Final

from batchnorm_client.wire.errors import Unauthenticated
from batchnorm_service.runtime import Runtime

log = logging.getLogger(__name__)

FIRST_DELAY: Final = 0.25
MAX_DELAY: Final = 1.0
FORGET_SECONDS: Final = 60.0
"""An address without failures for so long starts again with the first delay."""

MAX_ADDRESSES: Final = 1024
MAX_DELAYED: Final = 256
"""Maximum delayed answers at a time: each holds a connection with up to 64 KiB of its request's body."""


class WrongTokenError(Unauthenticated):
    """The token is unknown, or was revoked. The problem document is that of `Unauthenticated`."""


class Failures:
    """Counts wrong tokens, in all and by the caller's address; its memory is bounded.

    Attributes:
        total: wrong tokens since the start.
        delayed: answers that are delayed now.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.total = 0
        self.delayed = 0
        self._runtime = runtime
        self._by_address: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def delay(self, address: str) -> bool:
        """Count a wrong token and wait; False, at once, if too many wait already."""
        seconds = self._count(address)
        if self.delayed >= MAX_DELAYED:
            return False
        self.delayed += 1
        try:
            await self._runtime.sleep(seconds)
        finally:
            self.delayed -= 1
        return True

    def _count(self, address: str) -> float:
        """The delay: it doubles with every failure of an address."""
        now = self._runtime.now()
        count, last = self._by_address.pop(address, (0, now))
        count = count + 1 if now - last < FORGET_SECONDS else 1
        self._by_address[address] = count, now
        if len(self._by_address) > MAX_ADDRESSES:
            self._by_address.popitem(last=False)
        self.total += 1
        if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: the log grows slowly, whatever is sent
            log.warning("wrong token from %s, %d in a row", address, count)
        return min(FIRST_DELAY * 2.0 ** min(count - 1, 10), MAX_DELAY)
