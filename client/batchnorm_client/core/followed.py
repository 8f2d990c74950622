"""What a follower knows: the layer's newest state, and the batches that it has observed and that are not in it.

A frame that was sent may be in a state that arrives before the response to the frame. Until the response says which
version contains the frame, nobody can tell. So such a state is used for `eval` at once, but for `observe`, which counts
the follower's own batches in, only when the frame's version is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchnorm_client.kernels.moments import BatchMoments
from batchnorm_client.kernels.running import RunningState
from batchnorm_client.results import LayerStates
from batchnorm_client.wire.errors import BatchNormError, ShapeMismatch

if TYPE_CHECKING:
    from batchnorm_client.options import Moments


@dataclass(slots=True, eq=False)
class Frame:
    """Batches that are folded in one call.

    Attributes:
        key: its idempotency key.
        batches: in their order.
        version: of the commit that folded them; None while that is not known.
    """

    key: str
    batches: list[BatchMoments]
    version: int | None = None

    @property
    def stack(self) -> Moments:
        """Count, mean and variance of all batches, as they are sent."""
        counts, means, variances = zip(*self.batches, strict=True)
        return np.array(counts, np.int64), np.array(means), np.array(variances)


class Followed:
    """A layer's state and the batches that are not in it. Not thread-safe: `Follower` has a lock.

    Args:
        name: of the layer.
        states: the layer's newest state.
        at: when the service was asked for it, on the runtime's clock.

    Attributes:
        states: the newest that arrived.
        newest: the same, for normalizing.
        confirmed: a time at or after which `newest` was the service's newest state.
        error: why there is no such layer to follow; None if there is.
        added: how many batches were observed.
        taken: how many of them were put into frames.
        settled: how many of them were folded, or given up.
        oldest: when the first batch that waits to be sent was observed; None if none waits.
    """

    def __init__(self, name: str, states: LayerStates, at: float) -> None:
        self.name = name
        self.states = states
        self.newest = self._running(states)
        self.confirmed = at
        self.error: Exception | None = None
        self.added = self.taken = self.settled = 0
        self.oldest: float | None = None
        self._failure: BatchNormError | None = None
        self._given_up = 0
        self._base, self._base_confirmed = self.newest, at
        self._current: RunningState | None = self.newest
        self._unsent: list[BatchMoments] = []
        self._frames: list[Frame] = []

    @property
    def unsettled(self) -> int:
        """How many observed batches are not known to be folded."""
        return self.added - self.settled

    @property
    def kept(self) -> int:
        """How many batches are in memory: those that are not in the state that `observe` uses."""
        return len(self._unsent) + sum(len(frame.batches) for frame in self._frames)

    @property
    def in_doubt(self) -> bool:
        """Whether a frame was sent whose outcome is not known."""
        return any(frame.version is None for frame in self._frames)

    @property
    def base_confirmed(self) -> float:
        """As `confirmed`, for the state that `observe` uses."""
        return self.confirmed if self._base is self.newest else self._base_confirmed

    def arrived(self, states: LayerStates, at: float) -> None:
        """The service was asked at this time, and returned these states, or that they are still current.

        Raises:
            InvalidRequest: the layer can no longer be followed.
        """
        if states is not self.states:
            newest = self._running(states)
            if self._base is self.newest:
                self._base_confirmed = self.confirmed
            self.states, self.newest = states, newest
        self.confirmed, self.error = at, None
        self._rebase()

    def add(self, moments: BatchMoments, at: float) -> RunningState:
        """Count a batch; return the state with all batches that it does not contain yet.

        Raises:
            ShapeMismatch, NonFinite: it cannot be folded; it is not counted.
        """
        current = self.current()
        self._check_channels(current, moments)
        after = current.fold([moments])
        self._unsent.append(moments)
        self._current = after
        self.added += 1
        if self.oldest is None:
            self.oldest = at
        return after

    def current(self) -> RunningState:
        """The state with all batches folded in that it does not contain yet."""
        if self._current is None:
            batches = [batch for frame in self._frames for batch in frame.batches]
            self._current = self._base.fold(batches + self._unsent)
        return self._current

    def take(self, limit: int, key: str) -> Frame:
        """Put the oldest batches, at most so many, into a frame to be sent."""
        frame = Frame(key, self._unsent[:limit])
        self._unsent = self._unsent[limit:]
        self._frames.append(frame)
        self.taken += len(frame.batches)
        if not self._unsent:
            self.oldest = None
        return frame

    def folded(self, frame: Frame, version: int) -> None:
        """A frame was folded by the commit of this version."""
        frame.version = version
        self.settled += len(frame.batches)
        self._rebase()

    def give_up(self, frame: Frame, error: BatchNormError) -> None:
        """A frame will not be sent again."""
        self._frames.remove(frame)
        self._lose(len(frame.batches), error)
        self._rebase()

    def take_failure(self) -> BatchNormError | None:
        """Why batches were given up since this was last called, with a note of how many; None if none were."""
        failure, self._failure = self._failure, None
        if failure is not None:
            failure.add_note(f"{self._given_up} observed batches of layer {self.name!r} are given up")
            self._given_up = 0
        return failure

    def _rebase(self) -> None:
        """Go on from the newest state, if it is known which frames it contains."""
        if self.in_doubt:
            return
        version = self.newest.local.version
        self._frames = [frame for frame in self._frames if frame.version is not None and frame.version > version]
        self._base, self._current = self.newest, None
        try:
            for batch in self._unsent[:1]:  # all have as many channels
                self._check_channels(self._base, batch)
        except ShapeMismatch as error:  # another layer has the name
            self._lose(len(self._unsent), error)
            self.taken += len(self._unsent)
            self._unsent, self._frames, self.oldest = [], [], None

    def _lose(self, batches: int, error: BatchNormError) -> None:
        self.settled += batches
        self._given_up += batches
        self._failure = self._failure or error
        self._current = None

    def _running(self, states: LayerStates) -> RunningState:
        return RunningState.of(states.configs[self.name], states.versions[self.name], states.tensors[self.name])

    def _check_channels(self, state: RunningState, moments: BatchMoments) -> None:
        channels = state.local.config.num_features
        if len(moments.mean) != channels:
            raise ShapeMismatch(
                f"layer {self.name!r} has {channels} channels now, not {len(moments.mean)}",
                field="input",
                expected=channels,
                got=len(moments.mean),
            )
