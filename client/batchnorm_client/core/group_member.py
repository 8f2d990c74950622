"""Membership in a synchronized batch: which group a call belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm_client.wire.errors import InvalidRequest

GROUP_TIMEOUT = 30.0
"""Seconds that the service waits for a group's members unless it is told otherwise."""


@dataclass(frozen=True, slots=True)
class GroupMember:
    """Which synchronized batch a call is a part of.

    Attributes:
        group: its id.
        size: how many members it has.
        timeout: seconds to wait for the others; None for the service's default.
    """

    group: str
    size: int
    timeout: float | None = None

    @classmethod
    def of(cls, group: str | None, size: int | None, timeout: float | None) -> GroupMember | None:
        """None without a group.

        Raises:
            InvalidRequest: only some of what makes a group.
        """
        if group is None and size is None and timeout is None:
            return None
        if group is None or size is None:
            raise InvalidRequest("group and size go together, and timeout with them", field="size", expected="both")
        return cls(group, size, timeout)


def group_wait(member: GroupMember | None) -> float:
    """How long the service may wait for the other members."""
    if member is None:
        return 0.0
    return GROUP_TIMEOUT if member.timeout is None else member.timeout
