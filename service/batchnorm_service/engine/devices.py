"""Which devices there are."""

from __future__ import annotations

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
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device {name!r} is not available here", field="device", expected=available_devices(), got=name
        )
    return found
