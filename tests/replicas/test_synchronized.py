"""Shards of one batch that arrive at different replicas: one batch, one fold, one answer for each."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.anyio

LAYER = "/v1/layers/shared"
SIZES = (4, 1, 6)


def _shards(seed: int) -> list[np.ndarray]:
    whole = np.random.default_rng(seed).normal(seed, 2, size=(sum(SIZES), 3)).astype(np.float32)
    return np.split(whole, np.cumsum(SIZES)[:-1])


async def _train(replica: httpx.AsyncClient, shard: np.ndarray, group: str, member: int) -> httpx.Response:
    return await replica.post(
        f"{LAYER}/train",
        params={"group": group, "size": len(SIZES)},
        json={"input": shard.tolist()},
        headers={"Idempotency-Key": f"{group}-{member}"},
    )


async def test_shards_meet_in_the_store_and_are_folded_once(replicas: list[httpx.AsyncClient]) -> None:
    (await replicas[0].put(LAYER, json={"num_features": 3})).raise_for_status()
    module = nn.BatchNorm1d(3)
    for step in range(5):
        shards = _shards(step)
        answers = await asyncio.gather(
            *(_train(replicas[(n + step) % 3], shard, f"step{step}", n) for n, shard in enumerate(shards))
        )
        told = [answer.raise_for_status().json() for answer in answers]
        expected = module(torch.from_numpy(np.concatenate(shards))).detach().numpy()
        got = np.concatenate([np.array(one["output"], np.float32).reshape(-1, 3) for one in told])
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert {(one["version"], one["num_batches_tracked"]) for one in told} == {(told[0]["version"], step + 1)}

        member = step % 3  # its answer was lost: it asks another replica
        again = await _train(replicas[(member + step + 1) % 3], shards[member], f"step{step}", member)
        assert again.raise_for_status().headers["idempotent-replay"] == "true"
        assert again.json() == told[member]
        late = await _train(replicas[0], shards[0], f"step{step}", 7)
        assert (late.status_code, late.json()["type"]) == (409, "/problems/group-closed")
    layer = (await replicas[2].get(LAYER)).raise_for_status().json()
    assert layer["num_batches_tracked"] == 5
    assert np.allclose(np.array(layer["running_mean"]), module.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    assert np.allclose(np.array(layer["running_var"]), module.running_var.numpy(), rtol=1e-5, atol=1e-6)


async def test_many_groups_at_once_through_every_replica(replicas: list[httpx.AsyncClient]) -> None:
    (await replicas[0].put(LAYER, json={"num_features": 3})).raise_for_status()
    answers = await asyncio.gather(
        *(
            _train(replicas[(group + n) % 3], shard, f"group{group}", n)
            for group in range(10)
            for n, shard in enumerate(_shards(group))
        )
    )
    batches = [answer.raise_for_status().json()["num_batches_tracked"] for answer in answers]
    assert sorted(batches) == sorted(list(range(1, 11)) * 3)
    assert all(len(set(batches[start : start + 3])) == 1 for start in range(0, 30, 3))
