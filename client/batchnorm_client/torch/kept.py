"""Kept states of layers, for modules that evaluate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm_client import Layer, LayerNotFound, LayerOptions, RemoteLayer, VersionNotFound


def read_kept(handles: Sequence[RemoteLayer]) -> list[Layer]:
    """The states that handles choose, all with the same `at`.

    Raises:
        VersionNotFound: some layers or states do not exist; all of them are named.
        DigestMismatch: a state has another digest than expected.
    """
    found: list[Layer] = []
    missing: list[str] = []
    for handle in handles:
        try:
            found.append(handle.inspect())
        except (LayerNotFound, VersionNotFound):
            missing.append(handle.name)
    if missing:
        at = handles[0].at
        what = "do not exist" if at is None else f"have no state {at!r}"
        raise VersionNotFound(
            f"{len(missing)} of {len(handles)} layers {what}: {', '.join(missing)}", layers=missing, got=at
        )
    return found


def check_fits(layer: Layer, num_features: int, options: LayerOptions) -> None:
    """Check that a module can evaluate a kept state.

    Raises:
        ValueError: it has other channels, dtype, ranks or tensors.
    """
    wanted: dict[str, Any] = {
        "num_features": num_features,
        "channel_axis": 1,
        "affine": options["affine"],
        "track_running_stats": options["track_running_stats"],
        "dtype": options["dtype"],
    }
    config = layer.config
    has = {name: getattr(config, name) for name in wanted} | {"track_running_stats": layer.running_mean is not None}
    if config.dimensions is not None:
        wanted["dimensions"], has["dimensions"] = options["dimensions"], config.dimensions
    differ = [f"{name} is {has[name]!r}, not {wanted[name]!r}" for name in wanted if has[name] != wanted[name]]
    if differ:
        raise ValueError(f"layer {layer.name!r} does not fit the module: {'; '.join(differ)}")


def expected_digests(names: Sequence[str], expect: Mapping[str, str] | None) -> dict[str, str | None]:
    """The digest that each layer must have; None for any.

    Raises:
        ValueError: the digests are those of other layers.
    """
    if expect is None:
        return dict.fromkeys(names)
    if expect.keys() != set(names):
        raise ValueError(f"digests and layers of different models: {', '.join(sorted(expect.keys() ^ set(names)))}")
    return {name: expect[name] for name in names}
