"""Faults that are planted to prove that a machine finds them: each takes the place of a function of the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from batchnorm_client.kernels.population import PopulationSums
from batchnorm_client.wire.errors import ProblemError
from batchnorm_service.engine import state
from batchnorm_service.engine.accumulators import moving
from batchnorm_service.engine.moments import Moments
from batchnorm_service.engine.state import LayerState
from batchnorm_service.layers import batches, update_queue
from batchnorm_service.layers.cached_state import CachedState
from batchnorm_service.store.memory import MemoryStore
from simulation import mutants

Patch = pytest.MonkeyPatch


def the_biased_variance_is_folded(patch: Patch) -> None:
    running = moving._running

    def biased(state: LayerState, batches: Sequence[Moments]) -> Any:
        return running(state, [replace(each, var=each.biased_var(), correction=1) for each in batches])

    patch.setattr(moving, "_running", biased)


def a_population_has_no_distance_of_means(patch: Patch) -> None:
    fold = PopulationSums.fold

    def without(self: PopulationSums[Any], count: int, mean: Any, var: Any, half_life: float | None) -> Any:
        merged = fold(self, count, mean, var, half_life)
        m2 = self.m2 + var * count
        return PopulationSums(merged.mean, m2, merged.weight, merged.squares)

    patch.setattr(PopulationSums, "fold", without)


def a_refused_batch_is_counted(patch: Patch) -> None:
    prepared = batches._prepared

    async def counted(cached: CachedState, prepare: Any) -> Any:
        try:
            return await prepared(cached, prepare)
        except ProblemError:
            layer = await cached.latest_known()
            samples = layer.state.samples_tracked + 1
            cached.set(replace(layer, state=layer.state._replace(samples_tracked=samples)))
            raise

    patch.setattr(batches, "_prepared", counted)


def if_match_is_ignored(patch: Patch) -> None:
    patch.setattr(update_queue, "check_version", lambda *_: None)


def reset_keeps_the_number_of_batches(patch: Patch) -> None:
    reset = state.reset

    def kept(layer: state.LayerState, what: str) -> state.LayerState:
        return reset(layer, what)._replace(num_batches_tracked=layer.num_batches_tracked)

    patch.setattr(state, "reset", kept)


def versions_begin_again_after_delete(patch: Patch) -> None:
    delete = MemoryStore.delete

    async def forgetful(self: MemoryStore, name: str, expected: Any, **options: Any) -> Any:
        outcome = await delete(self, name, expected, **options)
        self._floor = 0
        return outcome

    patch.setattr(MemoryStore, "delete", forgetful)


FAULTS: dict[str, Callable[[Patch], None]] = {
    plant.__name__.replace("_", " "): plant
    for plant in (
        the_biased_variance_is_folded,
        a_population_has_no_distance_of_means,
        a_refused_batch_is_counted,
        if_match_is_ignored,
        reset_keeps_the_number_of_batches,
        versions_begin_again_after_delete,
        mutants.receipts_are_not_written,
        mutants.keys_are_not_compared_with_their_batches,
        mutants.waiting_folds_are_written_in_another_order,
    )
}
"""By what goes wrong; the last three are also those of the simulated world."""
