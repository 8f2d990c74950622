"""Calls that a whole model makes together: one for the states that it evaluates, one for parameters that changed."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from batchnorm_client import Client, LayerStates, ProblemError
from batchnorm_client.kernels.state import LocalState

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from batchnorm_client.torch.modules import RemoteBatchNorm

_MAX_NAMES_BYTES = 16_000
"""Of the names in one URL; the service reads 32,768 bytes by default."""


class _Forward:
    """A forward pass of the root that goes on.

    Attributes:
        frame: of torch's call of the root.
        pushed: whether changed parameters were sent.
        states: of the layers that it evaluates here, read since it began, by name; None if they were not read yet.
    """

    def __init__(self, frame: FrameType) -> None:
        self.frame = frame
        self.pushed = False
        self.states: dict[str, LocalState] | None = None


class ModelCalls:
    """The calls that modules of a model make together during a forward pass of its root; each thread has its own pass.

    The first module that is used in the pass sends the changed weights and biases of all modules, and the first one
    that evaluates here reads the states of all that do. Both happen after the pass began, so it uses every commit that
    was acknowledged before. Modules that are used outside of such a pass make their own calls.

    Args:
        client: of the service.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._users: dict[str, RemoteBatchNorm] = {}
        self._hooks: list[RemovableHandle] = []
        self._thread = threading.local()
        self._read: dict[tuple[str, ...], tuple[LayerStates, dict[str, LocalState]]] = {}

    def attach(self, root: nn.Module) -> None:
        """Take part in the forward passes of this module."""

        def before(*_: object) -> None:
            self._passes().append(_Forward(sys._getframe(1)))

        def after(*_: object) -> None:
            passes = self._passes()  # after an exception, without the pass that has ended by it
            if passes and passes[-1].frame is sys._getframe(1):
                passes.pop()

        self._hooks = [root.register_forward_pre_hook(before), root.register_forward_hook(after, always_call=True)]

    def detach(self, root: nn.Module) -> None:
        """Remove the hooks from a copy of the root; other modules are not changed."""
        for hook in self._hooks:
            for hooks in (root._forward_pre_hooks, root._forward_hooks, root._forward_hooks_always_called):
                hooks.pop(hook.id, None)

    def join(self, user: RemoteBatchNorm) -> None:
        """Add a module."""
        self._users[user.name] = user

    def leave(self, user: RemoteBatchNorm) -> None:
        """Remove a module; the last one removes the hooks."""
        self._users.pop(user.name, None)
        if not self._users:
            for hook in self._hooks:
                hook.remove()

    def begin(self) -> bool:
        """A module is used: send what changed of all modules, unless this pass has done so.

        Returns:
            Whether a pass goes on in this thread.

        Raises:
            ProblemError: for a layer. The parameters of the others were sent.
            BatchNormError: for the whole call.
        """
        passes = self._passes()
        if not passes:
            return False
        if not passes[-1].pushed:
            passes[-1].pushed = True
            self._push()
        return True

    def state(self, name: str) -> LocalState | None:
        """The state of a layer to evaluate in this pass; None outside of one, and for a layer that is not known."""
        passes = self._passes()
        if not passes:
            return None
        forward = passes[-1]
        if forward.states is None:
            forward.states = self._states()
        return forward.states.get(name)

    def forget(self, name: str) -> None:
        """This thread has changed a layer: the states that were read are no longer its newest."""
        for forward in self._passes():
            if forward.states is not None:
                forward.states.pop(name, None)

    def _passes(self) -> list[_Forward]:
        """The passes that go on in this thread, the innermost last.

        One that was interrupted (KeyboardInterrupt does not call hooks) goes on no longer: its frame is not on the
        stack.
        """
        passes: list[_Forward] = self._thread.__dict__.setdefault("passes", [])
        while passes and not _is_running(passes[-1].frame):
            passes.pop()
        return passes

    def _push(self) -> None:
        if any(user.evaluates_here for user in self._users.values()):
            next(iter(self._users.values())).flush()
        changed: dict[str, dict[str, Any]] = {}
        for name, user in self._users.items():
            if user.sends_parameters and (parameters := user.changed_parameters()):
                changed[name] = parameters
        if len(changed) < 2:
            return  # the module sends its own
        before = {name: self._users[name].forget_sent() for name in changed}
        errors: list[ProblemError] = []
        for name, result in self._client.load_states(changed).items():
            if isinstance(result, ProblemError):
                result.add_note(f"layer {name!r}, one of {len(changed)}")
                errors.append(result)
            else:
                self._users[name].remember_sent(before[name] | changed[name])
        if errors:
            raise errors[0]

    def _states(self) -> dict[str, LocalState]:
        states: dict[str, LocalState] = {}
        names = [name for name, user in self._users.items() if user.evaluates_here]
        while names:
            part: list[str] = []
            size = 0
            while names and (not part or size + len(names[0]) < _MAX_NAMES_BYTES):
                size += len(names[0]) + 1
                part.append(names.pop(0))
            known, cached = self._read.get(tuple(part), (None, {}))
            found = self._client.states(part, known=known)
            if found is not known:
                cached = {name: _local_state(found, name, self._users[name]) for name in part}
                self._read[tuple(part)] = found, cached
            states |= cached
        return states


def _local_state(states: LayerStates, name: str, user: RemoteBatchNorm) -> LocalState:
    tensors = {
        key: torch.from_numpy(array.copy()).to(user.state_device)
        for key, array in states.tensors[name].items()
        if array.ndim
    }
    batches = states.tensors[name].get("num_batches_tracked")
    return LocalState(
        states.configs[name],
        states.versions[name],
        0 if batches is None else int(batches),
        tensors.get("weight"),
        tensors.get("bias"),
        tensors.get("running_mean"),
        tensors.get("running_var"),
        "",
    )


def _is_running(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
