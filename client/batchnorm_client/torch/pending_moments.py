"""The moments of one training step of a whole model, folded in one call."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING
from uuid import uuid4

from torch import nn

from batchnorm_client import Client, FoldResult, ProblemError, ServiceError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from batchnorm_client.kernels.moments import BatchMoments


@dataclass(slots=True)
class PendingBatch:
    """The moments of one batch, until it is known that they were folded.

    Attributes:
        moments: of the batch.
        key: the idempotency key that they were first sent with, also used for repeats; None if not sent yet. Moments of
            other layers that were first sent in the same call share it.
    """

    moments: BatchMoments
    key: str | None = None


class PendingMoments:
    """Collects moments by layer, and sends them together: after the root's forward pass, or before they are needed.

    Thread-safe.

    Args:
        client: of the service.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._batches: dict[str, deque[PendingBatch]] = {}
        self._users: set[nn.Module] = set()
        self._hooks: list[RemovableHandle] = []
        self._in_forward = False
        self._sending = Lock()
        self._process = os.getpid()

    def attach(self, root: nn.Module) -> None:
        """Flush after each forward pass of this module, also if it fails: torch would have counted the batch, too."""

        def before(*_: object) -> None:
            self._in_forward = True

        def after(*_: object) -> None:
            self._in_forward = False
            self.flush()

        self._hooks = [root.register_forward_pre_hook(before), root.register_forward_hook(after, always_call=True)]

    def detach(self, root: nn.Module) -> None:
        """Remove the hooks from a copy of the root; other modules are not changed."""
        for hook in self._hooks:
            for hooks in (root._forward_pre_hooks, root._forward_hooks, root._forward_hooks_always_called):
                hooks.pop(hook.id, None)

    def join(self, user: nn.Module, name: str) -> None:
        """Register a module that adds moments for the layer of that name."""
        self._users.add(user)
        self._batches[name] = deque()

    def leave(self, user: nn.Module) -> None:
        """Flush, and unregister a module; the last one removes the hooks."""
        self.flush()
        self._users.discard(user)
        if not self._users:
            for hook in self._hooks:
                hook.remove()

    def add(self, name: str, moments: BatchMoments) -> None:
        """Add moments of a layer, to be folded after those that are pending.

        Outside of the root's forward pass, a layer's second batch sends both, so that moments do not accumulate when
        only a part of the model is called.

        Raises:
            As `flush`. The moments were added.
        """
        self._forget_the_parents()
        self._batches[name].append(PendingBatch(moments))
        if len(self._batches[name]) > 1 and not self._in_forward:
            self.flush()

    def flush(self) -> None:
        """Send pending moments: one call for the first batch of each layer, another one for the second, and so on.

        Raises:
            ProblemError: for a layer. If its moments were refused (4xx) they are dropped; otherwise they stay pending.
                Those of other layers were folded.
            BatchNormError: for the whole call. Its moments stay pending, each batch with the key that it had.
        """
        self._forget_the_parents()
        errors: dict[str, ProblemError] = {}
        with self._sending:
            stuck: set[str] = set()
            while heads := {name: queue[0] for name, queue in self._batches.items() if queue and name not in stuck}:
                for name, result in self._send(heads).items():
                    if not isinstance(result, FoldResult):
                        errors.setdefault(name, result)
                    if isinstance(result, ServiceError):  # not caused by the batch: another attempt may succeed
                        stuck.add(name)
                    else:
                        self._batches[name].popleft()
        for name, error in errors.items():
            error.add_note(f"layer {name!r}, one of {len(self._batches)}")
            raise error

    def _forget_the_parents(self) -> None:
        """After a fork: the parent sends what was pending, or it would be counted twice; and its lock may be held."""
        if self._process != os.getpid():
            self._process, self._sending = os.getpid(), Lock()
            for queue in self._batches.values():
                queue.clear()

    def _send(self, heads: dict[str, PendingBatch]) -> dict[str, FoldResult | ProblemError]:
        fresh = uuid4().hex
        keys: dict[str, str] = {}
        for name, head in heads.items():
            head.key = keys[name] = head.key or fresh
        return self._client.fold_moments({name: head.moments for name, head in heads.items()}, key=keys)
