"""Which devices there are."""

from __future__ import annotations

from functools import lru_cache

import torch

from batchnorm_client.errors import DeviceUnavailable


def available_devices() -> list[str]:
    """The names of the devices of this machine, "cpu" first."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        DeviceUnavailable: it is not there.
    """
    found = _parsed(name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device {name!r} is not available here", field="device", expected=available_devices(), got=name
        )
    return found


_parsed = lru_cache(maxsize=64)(torch.device)
