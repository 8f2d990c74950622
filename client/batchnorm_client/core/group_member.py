"""The group that a call belongs to, if it sends a shard of a synchronized batch."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm_client.wire.errors import InvalidRequest

GROUP_TIMEOUT = 30.0
"""Seconds that the service waits for a group's members unless it is told otherwise."""


@dataclass(frozen=True, slots=True)
class GroupMember:
    """The synchronized batch that a call is a part of.

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
            InvalidRequest: `group` without `size`, `size` without `group`, or `timeout` without them.
        """
        if group is None and size is None and timeout is None:
            return None
        if group is None or size is None:
            raise InvalidRequest("group and size go together, and timeout with them", field="size", expected="both")
        return cls(group, size, timeout)


def group_wait(member: GroupMember | None) -> float:
    """Seconds that the service may wait for the other members; 0 without a group."""
    if member is None:
        return 0.0
    return GROUP_TIMEOUT if member.timeout is None else member.timeout
