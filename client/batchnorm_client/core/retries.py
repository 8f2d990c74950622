"""When to send a call again, and how long to wait first.

Why not stamina or tenacity: the next request is not always the same (after a lost response to a DELETE the client reads
the layer instead of deleting again), and the deadline must limit the wait that `Retry-After` asks for and the timeouts
of each attempt; theirs is checked between attempts only. They would replace a loop of four lines. Here retries are a
value that does not sleep, so that both clients share it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from batchnorm_client.core.messages import Request, Response
from batchnorm_client.core.problems import error_of, may_have_taken_effect, unreadable
from batchnorm_client.core.runtime import Runtime
from batchnorm_client.wire.errors import (
    BatchNormError,
    NoAnswer,
    ProblemError,
    TimedOut,
    UnexpectedAnswer,
)

T = TypeVar("T")

_log = logging.getLogger("batchnorm_client")
_TRANSIENT: Final = (408, 502, 503, 504)
"""Statuses after which the same call may succeed: the network was too slow, or a server was unavailable."""

_NEVER_AGAIN: Final = {"group-incomplete"}
"""Problems whose status suggests a retry, although the same call cannot succeed."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a call is sent, and when the client gives up.

    Attributes:
        attempts: maximum number of attempts; 1 turns retries off.
        deadline: seconds for a call with all its attempts and waits; None for no limit. Keep it below the service's
            BATCHNORM_RECEIPT_SECONDS (one hour by default), or a late repeat may be counted twice. For a call that
            waits for the other members of a group, the time that it may wait is added.
        wait_initial: seconds before the second attempt. Each later wait is twice as long; a random part of up to a half
            is subtracted, so that clients that failed together do not return together.
        wait_max: the longest wait that the client chooses itself. `Retry-After` of a response may ask for more.
    """

    attempts: int = 10
    deadline: float | None = 60.0
    wait_initial: float = 0.1
    wait_max: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or (self.deadline is not None and self.deadline <= 0):
            raise ValueError("attempts must be at least 1, and the deadline more than 0 seconds")
        if not 0 <= self.wait_initial <= self.wait_max:
            raise ValueError("wait_initial must be between 0 and wait_max")


class Attempts(Generic[T]):
    """The attempts of one call.

    Args:
        request: the call.
        retry: how often, and for how long.
        runtime: clock and random numbers.

    Attributes:
        request: what to send next.
        outcome_unknown: whether a failed attempt may have taken effect.
        deadline: seconds for the call with all its attempts; infinite if there is none.
        tries: how many attempts have failed.
    """

    def __init__(self, request: Request[T], retry: Retry, runtime: Runtime) -> None:
        self.request = request
        self.outcome_unknown = False
        self.deadline = math.inf if retry.deadline is None else retry.deadline + request.waits
        self._retry = retry
        self._runtime = runtime
        self.tries = 0
        self._unconfirmed: BatchNormError | None = None
        self._end = runtime.now() + self.deadline

    def left(self) -> float:
        """Seconds until the deadline; infinite without one, and 0 or less when it has passed."""
        return self._end - self._runtime.now()

    def remaining(self) -> float:
        """Seconds until the deadline; infinite without one.

        Raises:
            TimedOut: it has passed.
        """
        seconds = self.left()
        if seconds <= 0:
            raise self.timed_out()
        return seconds

    def timed_out(self) -> TimedOut:
        """The exception for a call that was ended by the deadline."""
        return TimedOut(f"no answer within the deadline of {self.deadline:g} s", outcome_unknown=True)

    def receive(self, response: Response) -> T:
        """The result.

        Raises:
            ProblemError, UnexpectedAnswer: the response is an error, or cannot be read.
        """
        if response.status not in self.request.statuses:
            raise error_of(response, self._runtime.date())
        try:
            result = self.request.read(response)
        except (ValueError, LookupError) as why:
            raise unreadable(response, why) from why
        if self.outcome_unknown and isinstance(result, dict):  # of many layers, some of which may have been refused
            for each in result.values():
                if isinstance(each, BatchNormError):
                    each.outcome_unknown = True
        return result

    def pause(self, error: BatchNormError) -> float:
        """Seconds to wait before `request` is sent, after an attempt that failed with `error`.

        Raises:
            BatchNormError: `error`, if there is no further attempt; its `outcome_unknown` is set.
        """
        self.outcome_unknown |= not self.request.reads and may_have_taken_effect(error)
        error.outcome_unknown = self.outcome_unknown
        self.tries += 1
        follow_up = self.request.confirm(error) if self.outcome_unknown and self.request.confirm else None
        if error is self._unconfirmed or (follow_up is None and not self._may_repeat(error)):
            raise error
        wait = 0.0 if follow_up else self._wait(error)
        if self.tries >= self._retry.attempts or self._runtime.now() + wait >= self._end:
            error.add_note(f"after {self.tries} tries")
            raise error
        self._warn(error, wait, follow_up)
        if follow_up is not None:
            self.request, self._unconfirmed = follow_up, error
        return wait

    def _warn(self, error: BatchNormError, wait: float, follow_up: Request[T] | None) -> None:
        """Log what is sent next and when it ends; otherwise nothing would be seen while the service is unreachable."""
        what = "sending it again" if follow_up is None else f"asking with {follow_up.method} whether it took effect"
        end = "no deadline" if self._end == math.inf else f"until the deadline in {self.left():.1f} s"
        _log.warning(
            "%s %s: %s: %s; %s in %.2f s (try %d of %d, %s)",
            self.request.method,
            self.request.target,
            type(error).__name__,
            error,
            what,
            wait,
            self.tries + 1,
            self._retry.attempts,
            end,
        )

    def _may_repeat(self, error: BatchNormError) -> bool:
        return _is_transient(error) and (self.request.repeat_if_unknown or not self.outcome_unknown)

    def _wait(self, error: BatchNormError) -> float:
        wait = min(self._retry.wait_max, self._retry.wait_initial * 2.0 ** min(self.tries - 1, 60))
        wait *= 0.5 + 0.5 * self._runtime.random()
        asked = getattr(error, "retry_after", None)
        return wait if asked is None else wait + float(asked)


def _is_transient(error: BatchNormError) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, NoAnswer):
        return not error.permanent
    if isinstance(error, ProblemError | UnexpectedAnswer):
        return error.status in _TRANSIENT and error.name not in _NEVER_AGAIN
    return False
