"""Names of devices, and the check whether they are available."""

from __future__ import annotations

from functools import lru_cache

import torch

from batchnorm_client.wire.errors import DeviceUnavailable


def available_devices() -> list[str]:
    """The names of the devices of this machine, "cpu" first."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


@lru_cache(maxsize=64)
def device(name: str) -> torch.device:
    """The device of that name. Only available devices are cached, since exceptions are not.

    Raises:
        DeviceUnavailable: this machine has no such device.
    """
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device {name!r} is not available here", field="device", expected=available_devices(), got=name
        )
    return found
