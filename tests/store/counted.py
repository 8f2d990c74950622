"""A store whose calls are counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from batchnorm_service.store.base import Conflict, Store


class Counted:
    """Passes calls on to `store`, and counts loads, commits and the commits that lost a race."""

    def __init__(self, store: Store) -> None:
        self.counts: Counter[str] = Counter()
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def load(self, *arguments: Any) -> Any:
        self.counts["load"] += 1
        return await self._store.load(*arguments)

    async def commit(self, *arguments: Any) -> Any:
        self.counts["commit"] += 1
        answer = await self._store.commit(*arguments)
        self.counts["conflict"] += isinstance(answer, Conflict)
        return answer
