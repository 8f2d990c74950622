"""The moments of one training step of a whole model, folded in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from torch import nn

from batchnorm_client import Client, FoldResult, ServiceError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from batchnorm_client.core.moments import BatchMoments


class Folding:
    """Collects moments by layer, and sends them together: after the root's forward, or when somebody has to see them.

    Args:
        client: of the service.

    Attributes:
        users: the modules that add to it.
    """

    def __init__(self, client: Client) -> None:
        self.users: set[nn.Module] = set()
        self._client = client
        self._waiting: dict[str, BatchMoments] = {}
        self._key: str | None = None
        self._hook: RemovableHandle | None = None

    def attach(self, root: nn.Module) -> None:
        """Flush after each forward pass of this module, also of one that fails: torch has counted by then, too."""
        self._hook = root.register_forward_hook(lambda *_: self.flush(), always_call=True)

    def leave(self, user: nn.Module) -> None:
        """Flush; the last one to leave takes the hook away."""
        self.flush()
        self.users.discard(user)
        if not self.users and self._hook is not None:
            self._hook.remove()

    def add(self, name: str, moments: BatchMoments) -> None:
        """Moments for a layer; a second batch for the same layer comes after the first, so that is sent before."""
        if name in self._waiting:
            self.flush()
        self._waiting[name] = moments

    def flush(self) -> None:
        """Send what waits.

        Raises:
            ProblemError: of a layer whose moments were refused; the others' were folded.
            BatchNormError: of the call. What may be folded or not waits on, under the same key.
        """
        if not self._waiting:
            return
        self._key = self._key or uuid4().hex
        results = self._client.fold_moments(self._waiting, key=self._key)
        errors = {name: error for name, error in results.items() if not isinstance(error, FoldResult)}
        # What is not the batch's fault may be tried again.
        self._waiting = {name: self._waiting[name] for name in errors if isinstance(errors[name], ServiceError)}
        if not self._waiting:
            self._key = None
        for name, error in errors.items():
            error.add_note(f"layer {name!r}, one of {len(results)}")
            raise error
