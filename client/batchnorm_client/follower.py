# Generated from async_follower.py by generate_sync.py (make sync-client): change that file, not this one.
"""A follower of a layer, for `Client`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from batchnorm_client.arrays import A
from batchnorm_client.core import Retry, calls, local, state_calls
from batchnorm_client.core.follow_options import (
    EXIT_SECONDS,
    INLINE_ELEMENTS,
    KEY_SECONDS,
    SHORTEST_INTERVAL,
    FollowOptions,
)
from batchnorm_client.core.followed import Followed, Frame
from batchnorm_client.core.samples import as_batch, as_given
from batchnorm_client.kernels.running import RunningState
from batchnorm_client.results import EvalResult, LayerStates
from batchnorm_client.wire.errors import (
    BatchNormError,
    BufferFull,
    ConnectionFailed,
    InvalidRequest,
    LayerNotFound,
    NoAnswer,
    StaleState,
    TimedOut,
)

if TYPE_CHECKING:
    from batchnorm_client.client import Client

T = TypeVar("T")

_log = logging.getLogger("batchnorm_client")


class Follower:
    """A layer whose state is kept in this process. Made by `Client.follow`. A context manager; threads may share it.

    A background thread waits for new states, another one sends the batches that were observed, as frames. A frame whose
    response was lost is sent again under its key until its outcome is known, for at most 45 minutes; so each batch is
    counted once. What cannot be counted is reported by the next `observe`, `flush` or `close`, which raises the error.

    A process that dies loses the batches that it has not sent: `unsent` of them, at most. `close`, which ends an
    `with` block, sends them. A follower that was not closed warns at exit how many batches were lost.

    After a fork, the child has a follower of its own, which starts from the same state and without the parent's
    batches.

    Attributes:
        name: of the layer.
    """

    def __init__(self, client: Client, name: str, options: FollowOptions, states: LayerStates, at: float) -> None:
        self.name = name
        self._client = client
        self._options = options
        self._runtime = client._runtime
        self._closed = False
        self._tasks: list[Any] = []
        self._take_back: Callable[[], object] = lambda: None
        self._begin(Followed(name, states, at))
        self._runtime.watch_forks(self)
        self._start()

    def eval(self, x: A) -> A:
        """Normalize a batch with the newest state that has arrived. Nothing is sent.

        Args:
            x: (N, C, *), or with the channels where the layer's `channel_axis` says, or one sample, (C,); a numpy array
                or a torch tensor, of a dtype that the layer takes. With torch on the CPU, the output is bit-equal to
                that of `RemoteLayer.eval`.

        Returns:
            The output, as `x` in type, shape, dtype and device.

        Raises:
            StaleState: `max_staleness` is exceeded, and was for `timeout` seconds.
            LayerNotFound: the layer was deleted; when it is created again, the follower goes on.
            ShapeMismatch, DtypeMismatch, TypeError: the batch does not fit the layer.
            ConnectionFailed: the follower is closed.
        """
        self._until(self._stale)
        return self._normalized(x, self._followed.newest)

    def observe(self, x: A) -> A:
        """Count a batch, and normalize it with the state that includes all batches that were observed here.

        Args:
            x: as for `eval`; at least two values per channel, or one for population statistics, as in training.

        Returns:
            The output, as for `eval`.

        Raises:
            As `eval`; then the batch was not counted.
            BufferFull: `max_unsent` batches are not known to be folded, and were not for `timeout` seconds.
            TooFewValues, NonFinite: the batch cannot be folded.
            BatchNormError: batches that were observed before could not be folded; this one was not counted.
        """
        self._until(self._not_ready_to_observe)
        batch = as_batch(x, self._options.cast)
        with self._lock:
            state = self._followed.current()
        moments = self._computed(batch, partial(local.observed_moments, state.local, batch))
        with self._lock:
            state = self._followed.add(moments, self._runtime.now())
            waiting = self._followed.added - self._followed.taken
        if waiting == 1 or waiting % self._options.sync_batches == 0:
            self._changes.notify()
        return self._normalized(x, state)

    def flush(self, timeout: float | None = None) -> None:
        """Return when all batches that were observed before are folded.

        Args:
            timeout: seconds to wait; by default that of `follow`.

        Raises:
            TimedOut: some are not known to be folded. They are kept, and sent again.
            BatchNormError: some could not be folded, and are given up.
        """
        self._check_open()
        self._start()
        end = self._runtime.now() + (self._options.timeout if timeout is None else timeout)
        target = self._flush_to = self._followed.added
        self._changes.notify()
        while True:
            seen = self._changes.number
            self._raise_failure()
            if self._followed.settled >= target:
                return
            left = end - self._runtime.now()
            if left <= 0:
                raise self._not_sent() from self._cause
            self._changes.wait(seen, left)

    def close(self, timeout: float | None = None) -> None:
        """Flush, and follow no longer. The client stays open.

        Args:
            timeout: as for `flush`.

        Raises:
            As `flush`; the follower is closed, and `unsent` batches are lost.
        """
        if self._closed:
            return
        try:
            self.flush(timeout)
        finally:
            self._closed = True
            self._take_back()
            self._changes.notify()
            for task in self._tasks:
                self._runtime.end(task)

    @property
    def version(self) -> int:
        """Of the state that `eval` uses."""
        return self._followed.newest.local.version

    @property
    def num_batches_tracked(self) -> int:
        """Of the state that `eval` uses."""
        return self._followed.newest.local.num_batches_tracked

    @property
    def unsent(self) -> int:
        """How many batches were observed and are not known to be folded."""
        return self._followed.unsettled

    @property
    def staleness(self) -> float:
        """Seconds since the service was last asked whether the state that `eval` uses is the newest, and it was."""
        return self._runtime.now() - self._followed.confirmed

    def forked(self) -> None:
        """This is a child process: go on from the parent's state, without its batches, locks and threads."""
        parent = self._followed
        self._begin(Followed(self.name, parent.states, parent.confirmed))

    def _begin(self, followed: Followed) -> None:
        self._followed = followed
        self._lock = self._runtime.lock()
        self._changes = self._runtime.signal()
        self._flush_to = 0
        self._cause: BatchNormError | None = None
        self._tasks = []

    def _start(self) -> None:
        if self._tasks:
            return
        with self._lock:
            if not self._tasks:
                work = (self._poll, self._send)
                self._tasks = [self._runtime.spawn(partial(self._in_background, each)) for each in work]
                self._take_back = self._runtime.at_exit(self._exit)

    def _exit(self) -> None:
        if self._closed or not self.unsent:
            return
        self._runtime.at_last(partial(self.close, EXIT_SECONDS))
        if self.unsent:
            _log.warning("%d observed batches of layer %r were not sent: the process exits", self.unsent, self.name)

    # ------------------------------------------------------------------------------------------------ calls

    def _until(self, problem: Callable[[], BatchNormError | None]) -> None:
        """Return when there is no problem. Raises it when it has lasted for `timeout` seconds."""
        self._check_open()
        self._start()
        if problem() is None:
            return
        end = self._runtime.now() + self._options.timeout
        while True:
            seen = self._changes.number
            error = problem()
            if error is None:
                return
            left = end - self._runtime.now()
            if left <= 0:
                raise error from self._cause
            self._changes.wait(seen, left)
            self._check_open()

    def _stale(self) -> StaleState | None:
        self._raise_gone()
        return self._older_than_allowed(self._followed.confirmed)

    def _not_ready_to_observe(self) -> BatchNormError | None:
        self._raise_gone()
        self._raise_failure()
        with self._lock:
            kept, confirmed = self._followed.kept, self._followed.base_confirmed
        if kept >= self._options.max_unsent:
            return BufferFull(f"{kept} observed batches of layer {self.name!r} are not known to be folded")
        return self._older_than_allowed(confirmed)

    def _older_than_allowed(self, confirmed: float) -> StaleState | None:
        limit = self._options.max_staleness
        age = self._runtime.now() - confirmed
        if limit is None or age <= limit:
            return None
        return StaleState(f"the state of layer {self.name!r} was last confirmed {age:.1f} s ago, more than {limit:g} s")

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionFailed("the follower is closed", permanent=True)

    def _raise_gone(self) -> None:
        if self._followed.error is not None:
            raise self._followed.error.with_traceback(None)

    def _raise_failure(self) -> None:
        with self._lock:
            failure = self._followed.take_failure()
        if failure is not None:
            raise failure

    def _not_sent(self) -> TimedOut:
        with self._lock:
            batches, in_doubt = self._followed.unsettled, self._followed.in_doubt
        return TimedOut(
            f"{batches} observed batches of layer {self.name!r} are not known to be folded", outcome_unknown=in_doubt
        )

    def _normalized(self, x: A, state: RunningState) -> A:
        batch = as_batch(x, self._options.cast)
        result: EvalResult[A] = self._computed(batch, partial(local.eval_step, state.local, batch, statistics=False))
        output: A = as_given(x, result).output
        return output

    def _computed(self, batch: Any, function: Callable[[], T]) -> T:
        if math.prod(getattr(batch, "shape", ())) <= INLINE_ELEMENTS:
            return function()
        return self._runtime.run(function)

    # ------------------------------------------------------------------------------------------------ background

    def _in_background(self, work: Callable[[], None]) -> None:
        """What ends one of the tasks is raised by later calls."""
        followed = self._followed
        try:
            work()
        except Exception as error:
            _log.exception("layer %r is no longer followed", self.name)
            followed.error = error
            self._changes.notify()

    def _poll(self) -> None:
        followed, failures = self._followed, 0
        wait = self._options.wait
        while not self._closed:
            began = self._runtime.now()
            pause = 0.0
            try:
                states = self._states(followed.states, wait)
            except (LayerNotFound, InvalidRequest) as error:  # a layer that comes again may be another one
                followed.error, wait, pause = error, 0.0, self._backoff(failures)
                failures += 1
            except BatchNormError as error:
                if isinstance(error, NoAnswer) and error.permanent:
                    followed.error = error
                    self._changes.notify()
                    return
                if not failures and not self._closed:
                    _log.warning("layer %r cannot be followed now, trying again: %s", self.name, error)
                self._cause, wait, pause = error, 0.0, self._backoff(failures)
                failures += 1
            else:
                if wait and states.versions[self.name] < followed.newest.local.version:
                    wait = 0.0  # read before the one that is known; or a failover lost that: ask for the newest
                    continue
                self._arrived(followed, states, began)
                self._cause = None
                failures, wait = 0, self._options.wait
                pause = began + SHORTEST_INTERVAL - self._runtime.now()
            self._changes.notify()
            if pause > 0:
                self._runtime.sleep(pause)

    def _arrived(self, followed: Followed, states: LayerStates, began: float) -> None:
        with self._lock:
            try:
                followed.arrived(states, began)
            except InvalidRequest as error:
                followed.error = error

    def _states(self, known: LayerStates, wait: float) -> LayerStates:
        request = state_calls.states([self.name], None, known, wait)
        return self._client._call(request, Retry(attempts=1, deadline=max(5.0, wait)))

    def _backoff(self, failures: int) -> float:
        return min(2.0, 0.1 * 2.0 ** min(failures, 10)) * (0.5 + 0.5 * self._runtime.random())

    def _send(self) -> None:
        followed, changes = self._followed, self._changes
        while not self._closed:
            seen = changes.number
            with self._lock:
                waiting = followed.added - followed.taken
                left = self._options.seconds_until_due(followed.oldest, waiting, self._runtime.now())
                if waiting and followed.taken < self._flush_to:
                    left = 0.0
                rows = self._options.rows(followed.newest.local.config.num_features)
                frame = followed.take(rows, self._runtime.key()) if left is not None and left <= 0 else None
            if frame is None:
                changes.wait(seen, left)
            else:
                self._deliver(followed, frame)
                changes.notify()

    def _deliver(self, followed: Followed, frame: Frame) -> None:
        """Send a frame until its outcome is known."""
        request = calls.fold_moments(self.name, frame.stack, key=frame.key)
        retry = Retry(attempts=1 << 31, deadline=KEY_SECONDS)
        while not self._closed:
            try:
                result = self._client._call(request, retry, self._pause)
            except BatchNormError as error:
                if isinstance(error, NoAnswer) and not (error.outcome_unknown or error.permanent):
                    continue  # it has certainly not been folded, so the key's age does not matter
                if not self._closed:  # else its batches stay unsent
                    with self._lock:
                        followed.give_up(frame, error)
                return
            with self._lock:
                followed.folded(frame, result.version)
            return

    def _pause(self, seconds: float) -> None:
        """Between two attempts. Raises `ConnectionFailed` when the follower is closed."""
        end = self._runtime.now() + seconds
        while not self._closed:
            seen = self._changes.number
            left = end - self._runtime.now()
            if left <= 0:
                return
            self._changes.wait(seen, left)
        raise ConnectionFailed("the follower was closed", outcome_unknown=True, permanent=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r} at {self._client.base_url})"
