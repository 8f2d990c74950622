"""What clients do in a world: drawn from its seed, and carried out through the real client."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np

from batchnorm_client import AsyncClient, LayerStates
from batchnorm_client.wire.errors import BatchNormError, LayerNotFound
from simulation.faults import Faults
from simulation.operations import Operation, Script

CHANNELS = 3
_TAGS = ("best", "ckpt-1")
_KINDS = {
    "train": 32,
    "observe": 12,
    "frame": 8,
    "eval": 22,
    "inspect": 10,
    "fold_moments": 8,
    "many": 4,
    "group": 5,
    "repeat": 8,
    "reset": 4,
    "update": 5,
    "load_state_dict": 3,
    "delete": 3,
    "create": 4,
    "refused": 3,
    "backward": 3,
    "inverse": 2,
    "names": 2,
    "pin": 6,
    "unpin": 2,
    "eval_at": 4,
    "rollback": 4,
    "history": 2,
    "load_states": 3,
    "wait": 3,
}

TRAIN_AND_READ = {"train": 40, "eval": 30, "inspect": 10}
"""What finds a state that is taken for another."""

TRAIN_AND_WAIT = {"wait": 20, "eval": 5}
"""What finds a wait that misses a commit."""

TRAIN_BESIDE = {
    "train": 10,
    "frame": 2,
    "eval": 3,
    "update": 3,
    "reset": 1,
    "load_state_dict": 1,
    "delete": 2,
    "create": 6,
}
"""What other clients do with the layers that are followed."""

_FOLLOWER_KINDS = {"observe": 60, "eval": 20, "flush": 10, "close": 5, "fork": 5}

_OF_MANY = {"many": ("fold_moments", "batches", "batch"), "load_states": ("load_state_dict", "state_dicts", "tensors")}
"""Calls on many layers: what they are for each of them, and the names of their arguments."""


def draw_configs(random: Random) -> dict[str, dict[str, Any]]:
    """One to three layers."""
    configs = {}
    for name in ["a", "b", "c"][: random.choice((1, 2, 3))]:
        population = random.random() < 0.3
        configs[name] = (
            {"statistics": "population", "momentum": None}
            if population
            else {"momentum": random.choice((None, 0.1, 0.5))}
        )
    return configs


def draw_scripts(  # noqa: C901, PLR0912 - a case for each kind
    random: Random, layers: list[str], length: int, weights: dict[str, int] = _KINDS, *, busy: bool = False
) -> list[Script]:
    """Two to ten clients. A group's members are steps of different clients with the same group."""
    scripts = [Script() for _ in range(random.randint(2, 10))]
    numpy = np.random.default_rng(random.getrandbits(32))
    keyed: list[tuple[str, str, dict[str, Any]]] = []
    busy = busy or random.random() < 0.5
    for number in range(length):
        kind, layer = random.choices(list(weights), list(weights.values()))[0], random.choice(layers)
        first, second = random.sample(scripts, 2)
        pause = random.expovariate(500 if busy else random.choice((1, 10, 100)))
        batch = _batch(random, numpy)
        match kind:
            case "train":
                arguments = {"batch": batch, "key": f"train-{number}"}
                keyed.append((layer, kind, arguments))
            case "observe":
                kind, arguments = "train", {"batch": batch, "key": f"observe-{number}", "normalize": "running"}
                keyed.append((layer, kind, arguments))
            case "frame":
                kind, arguments = "fold_moments", {"batch": _frame(random, numpy), "key": f"frame-{number}"}
                keyed.append((layer, kind, arguments))
            case "fold_moments":
                arguments = {"batch": batch, "key": f"moments-{number}"}
            case "refused":
                kind, arguments = "train", {"batch": batch * np.float32("nan"), "key": f"refused-{number}"}
            case "many":
                batches = {name: random.choice((_batch, _frame))(random, numpy) for name in layers}
                arguments = {"batches": batches, "key": f"many-{number}"}
            case "group":
                group = {"group": f"group-{number}", "timeout": random.choice((0.5, 5.0))}
                step = {"batch": batch, "key": f"first-{number}", **group}
                first.steps.append((pause, "train", layer, step))
                first, kind = second, "train"
                arguments = {"batch": _batch(random, numpy), "key": f"second-{number}", **group}
            case "repeat":
                if not keyed:
                    continue
                layer, kind, arguments = random.choice(keyed)
                if random.random() < 0.2:  # the same key for another batch, or for as many others
                    rows = arguments["batch"]
                    other = [_batch(random, numpy) for _ in rows] if isinstance(rows, list) else batch
                    arguments = arguments | {"batch": other}
            case "reset":
                what = random.choice(("running_stats", "parameters", "all"))
                arguments = {"what": what, "key": f"reset-{number}"}
            case "update":
                arguments = {"changes": _changes(random, numpy), "if_match": random.choice((None, None, 3, 5))}
            case "pin" | "unpin":
                tag = random.choice(_TAGS)
                step = {"tag": tag} | ({"key": f"pin-{number}"} if kind == "pin" else {})
                first.steps.append((pause, kind, layer, step))
                kind, arguments = "eval_at", {"batch": batch, "at": tag}
            case "eval_at":
                arguments = {"batch": batch, "at": _state(random)}
            case "rollback":
                arguments = {"to": _state(random), "key": f"rollback-{number}"}
            case "delete":
                arguments = {"with_pins": random.random() < 0.5}
            case "load_states":
                given = {name: {"weight": _vector(numpy), "bias": _vector(numpy)} for name in layers}
                arguments = {"state_dicts": given, "versions": {}, "checked": number % 2 == 0}
            case "wait":
                others = [name for name in layers if name != layer]
                names = sorted([layer, *random.sample(others, min(1, len(others)))])
                third = random.choice([name for name in layers if name not in names] or [layer])
                arguments = {"names": names, "seconds": random.choice((0.2, 3.0)), "later": random.expovariate(100)}
                arguments |= {"batch": batch, "key": f"beside-{number}", "third": third}
            case "load_state_dict":
                arguments = {"tensors": {"weight": _vector(numpy), "bias": _vector(numpy)}}
            case _:
                arguments = {"batch": batch} if kind in ("eval", "backward", "inverse") else {}
        first.steps.append((pause, kind, layer, arguments))
    return scripts


def draw_followers(random: Random, layers: list[str], length: int) -> list[Script]:
    """One to three processes with followers, which are closed or killed now and then, and then made anew."""
    scripts = []
    numpy = np.random.default_rng(random.getrandbits(32))
    for _ in range(random.randint(1, 3)):
        layer, options, mortal = random.choice(layers), _options(random), random.random() < 0.5
        script = Script()
        for _ in range(length):
            kind = random.choices(list(_FOLLOWER_KINDS), list(_FOLLOWER_KINDS.values()))[0]
            batch = _batch(random, numpy)
            arguments = {"options": options, "batch": batch, "mean": batch.mean(0, np.float64)}
            if mortal and random.random() < 0.1:
                arguments["killed_after"] = random.expovariate(20)
            script.steps.append((random.expovariate(random.choice((1, 10, 100))), kind, layer, arguments))
        scripts.append(script)
    return scripts


def _options(random: Random) -> dict[str, Any]:
    """Of a follower."""
    batches, most = random.choice(((1, 2), (1, 1000), (3, 3), (3, 1000), (1000, 1000)))
    return {
        "max_staleness": random.choice((None, 0.3, 3.0)),
        "sync_every": random.choice((0.0, 0.1, 1.0, float("inf"))),
        "sync_batches": batches,
        "max_unsent": most,
        "timeout": random.choice((0.0, 0.5, 5.0)),
    }


def _batch(random: Random, numpy: np.random.Generator) -> np.ndarray:
    return numpy.normal(3, 2, (random.randint(2, 6), CHANNELS)).astype(np.float32)


def _frame(random: Random, numpy: np.random.Generator) -> list[np.ndarray]:
    """Batches whose moments are sent as one stack."""
    return [_batch(random, numpy) for _ in range(random.randint(1, 4))]


def _vector(numpy: np.random.Generator) -> np.ndarray:
    return numpy.normal(1, 0.5, CHANNELS).astype(np.float32)


def _state(random: Random) -> int | str:
    """A tag, or one of the versions that a layer has at first."""
    return random.choice(_TAGS) if random.random() < 0.75 else random.randint(1, 20)


def _changes(random: Random, numpy: np.random.Generator) -> dict[str, Any]:
    choices = {"eps": random.choice((1e-5, 1e-3, 0.1)), "weight": _vector(numpy), "bias": _vector(numpy)}
    choices["track_running_stats"] = random.random() < 0.5
    return {name: choices[name] for name in random.sample(list(choices), random.randint(1, 2))}


class Caller:
    """One client, which carries out a script and writes down what it saw.

    Args:
        client: the real one, over the simulated network.
        configs: of the layers.
        operations: where each call is written down.
        random: the world's.
        faults: how often it gives up.
    """

    def __init__(
        self,
        client: AsyncClient,
        configs: dict[str, dict[str, Any]],
        operations: list[Operation],
        random: Random,
        faults: Faults,
    ) -> None:
        self._client = client
        self._configs = configs
        self._operations = operations
        self._random = random
        self._faults = faults

    async def carry_out(self, script: Script) -> None:
        """All steps, one after the other."""
        for pause, kind, layer, arguments in script.steps:
            await asyncio.sleep(pause)
            names = list(arguments[_OF_MANY[kind][1]]) if kind in _OF_MANY else [layer]
            begun = [self._begin(kind, name, arguments) for name in names]
            patience = self._random.expovariate(2) if self._random.random() < self._faults.gives_up else None
            try:
                async with asyncio.timeout(patience):
                    result = await self._call(kind, layer, arguments)
                for operation in begun:
                    self._end(operation, result[operation.layer] if kind in _OF_MANY else result)
            except TimeoutError:
                for operation in begun:
                    operation.gave_up = True
                    operation.ended = self._now()
            except BatchNormError as error:
                for operation in begun:
                    self._end(operation, error)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _begin(self, kind: str, layer: str, arguments: dict[str, Any]) -> Operation:
        if kind in _OF_MANY:
            kind, many, one = _OF_MANY[kind]
            arguments = {name: value for name, value in arguments.items() if name != many} | {
                one: arguments[many][layer]
            }
        operation = Operation(kind, layer, arguments, self._now())
        self._operations.append(operation)
        return operation

    def _end(self, operation: Operation, result: Any) -> None:
        operation.ended = self._now()
        if isinstance(result, BatchNormError):
            operation.error = result
        else:
            operation.result = result

    async def _wait(self, name: str, arguments: dict[str, Any]) -> tuple[LayerStates, LayerStates, float]:
        """Wait for other states than those of now, while a batch is on its way that makes one.

        Returns:
            The states of before, those that the wait returned, and when it returned.
        """
        names = arguments["names"]
        known = await self._client.states(names)
        batch = {"batch": arguments["batch"]}
        steps = [(0.0, "train", name, batch | {"key": arguments["key"]}), (0.005, "eval", arguments["third"], batch)]
        beside = asyncio.gather(*(self.carry_out(Script([step])) for step in steps))
        try:
            await asyncio.sleep(arguments["later"])
            found = await self._client.states(names, known=known, wait=arguments["seconds"])
            return known, found, self._now()
        finally:
            await beside

    async def _load_states(self, state_dicts: dict[str, Any], versions: dict[str, int], checked: bool) -> Any:
        """Replace tensors, if `checked` only those of the versions that are read before, and noted in `versions`."""
        versions.clear()
        if checked:
            with suppress(LayerNotFound):  # one of them
                versions |= (await self._client.states(state_dicts)).versions
        return await self._client.load_states(state_dicts, versions=versions)

    async def _call(self, kind: str, name: str, arguments: dict[str, Any]) -> Any:  # noqa: C901, PLR0911, PLR0912 - the same
        layer, batch, key = self._client.layer(name), arguments.get("batch"), arguments.get("key")
        match kind:
            case "train" if "group" in arguments:
                return await layer.train(batch, key=key, group=arguments["group"], size=2, timeout=arguments["timeout"])
            case "train":
                return await layer.train(batch, key=key, normalize=arguments.get("normalize", "batch"))
            case "fold_moments":
                return await layer.fold_moments(*moments(batch), key=key)
            case "many":
                given = {name: moments(batch) for name, batch in arguments["batches"].items()}
                return await self._client.fold_moments(given, key=key)
            case "eval":
                return await layer.eval(batch)
            case "inspect":
                return await layer.inspect()
            case "backward":
                return await layer.backward(batch, batch, mode="train")
            case "inverse":
                return await layer.inverse(batch)
            case "names":
                return [each.name async for each in self._client.layers()]
            case "reset":
                return await layer.reset(arguments["what"], key=key)
            case "update":
                return await layer.update(if_match=arguments["if_match"], **arguments["changes"])
            case "load_state_dict":
                return await layer.load_state_dict(arguments["tensors"])
            case "load_states":
                return await self._load_states(**arguments)
            case "wait":
                return await self._wait(name, arguments)
            case "delete":
                return await layer.delete(with_pins=arguments["with_pins"])
            case "pin":
                return await layer.pin(arguments["tag"], key=key)
            case "unpin":
                return await layer.unpin(arguments["tag"])
            case "eval_at":
                return await self._client.layer(name, at=arguments["at"]).eval(batch)
            case "rollback":
                return await layer.rollback(arguments["to"], key=key)
            case "history":
                return [state async for state in layer.history()]
            case "create":
                return await self._client.create_layer(name, CHANNELS, **self._configs[name])
        raise AssertionError(kind)


def moments(batch: np.ndarray | list[np.ndarray]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Count, mean and biased variance, in float64; of a frame, stacked."""
    if isinstance(batch, list):
        counts, means, variances = (np.array(each) for each in zip(*map(moments, batch), strict=True))
        return counts, means, variances
    wide = batch.astype(np.float64)
    return len(wide), wide.mean(0), wide.var(0)
