"""Folding batches into a layer's running statistics, as the service does it, with numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from batchnorm_client.kernels.moments import BatchMoments
from batchnorm_client.kernels.moving import fold_rows, momenta
from batchnorm_client.kernels.population import PopulationSums
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import InvalidRequest, NonFinite

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class RunningState:
    """The state of a layer into which batches can be folded.

    Attributes:
        local: for normalizing; its vectors are numpy arrays.
        sums: of a population layer; else None.
    """

    local: LocalState
    sums: PopulationSums[Array] | None

    @classmethod
    def of(cls, config: LayerConfig, version: int, tensors: Mapping[str, Array]) -> RunningState:
        """The state with the tensors that the service returns.

        Raises:
            InvalidRequest: the layer keeps no running statistics, or folding its kind is not known here.
        """
        if "running_mean" not in tensors:
            raise InvalidRequest(
                "only a layer with running statistics can be followed", field="track_running_stats", expected=True
            )
        if config.statistics not in _FOLDS:
            raise InvalidRequest(
                f"{config.statistics} statistics cannot be folded by this client",
                field="statistics",
                expected=list(_FOLDS),
                got=config.statistics,
            )
        batches, weight, bias = int(tensors["num_batches_tracked"]), tensors.get("weight"), tensors.get("bias")
        mean, var = tensors["running_mean"], tensors["running_var"]
        local = LocalState(config, version, batches, weight, bias, mean, var, digest="")
        return cls(local, _sums(tensors))

    def fold(self, batches: Sequence[BatchMoments]) -> RunningState:
        """The state after these batches; the same one while the layer's tracking is off.

        Raises:
            NonFinite: the statistics would not be finite, and the layer rejects that.
        """
        config = self.local.config
        if not batches or not config.track_running_stats:
            return self
        counts = [batch.count for batch in batches]
        mean, var = np.array([batch.mean for batch in batches]), np.array([batch.var for batch in batches])
        with np.errstate(all="ignore"):
            running, sums = _FOLDS[config.statistics](self, counts, mean, var)
        if config.non_finite == "reject" and not np.isfinite(running).all():
            raise NonFinite(
                'the folded statistics are not finite; a layer with non_finite: "allow" takes such batches',
                field="input",
            )
        number = self.local.num_batches_tracked + len(batches)
        local = replace(self.local, running_mean=running[0], running_var=running[1], num_batches_tracked=number)
        return RunningState(local, sums)


def _sums(tensors: Mapping[str, Array]) -> PopulationSums[Array] | None:
    if "population_mean" not in tensors:
        return None
    samples = float(tensors["samples_tracked"])
    weight, squares = map(float, tensors.get("population_weights", (samples, samples)))
    return PopulationSums(tensors["population_mean"], tensors["population_m2"], weight, squares)


Folded = tuple[Array, PopulationSums[Array] | None]


def _fold_moving(state: RunningState, counts: list[int], mean: Array, var: Array) -> Folded:
    local = state.local
    running = np.array((local.running_mean, local.running_var))
    fold_rows(running, counts, mean, var, momenta(local.config.momentum, local.num_batches_tracked))
    return running, None


def _fold_population(state: RunningState, counts: list[int], mean: Array, var: Array) -> Folded:
    assert state.sums is not None  # noqa: S101 - the service returns them for such a layer
    half_life = state.local.config.half_life
    if len(counts) == 1:
        sums = state.sums.fold(counts[0], mean[0], var[0], half_life)
    else:
        sums = state.sums.fold_rows(counts, mean, var, half_life, lambda vector: vector)
    return np.array((sums.mean, sums.unbiased_var(np.ones_like(sums.m2)))).astype(state.local.config.dtype), sums


_FOLDS: Final[dict[str, Callable[[RunningState, list[int], Array, Array], Folded]]] = {
    "moving": _fold_moving,
    "population": _fold_population,
}
"""By the value of `statistics` in a layer's config."""
