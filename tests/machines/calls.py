"""The calls of a machine: on `Layers` directly, or as HTTP requests."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import numpy as np
import torch
from torch import Tensor

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.errors import PROBLEMS, LayerNotFound, RequestError
from batchnorm_client.wire.media_types import JSON, NPY, PROBLEM_JSON, SAFETENSORS
from batchnorm_client.wire.tensors import decode, encode
from batchnorm_service.engine.tensors import to_torch, to_wire
from batchnorm_service.layers import GroupCall, Layers
from layers.conftest import serving
from machines.model import Call, View
from rest.conftest import running


@dataclass(frozen=True, eq=False)
class Reply:
    """What a caller was told.

    Attributes:
        problem: the name of the problem of a call that was refused.
        output: of train and eval.
        created: whether a layer is new.
        each: of many layers, by name.
    """

    problem: str | None = None
    version: int = 0
    batches: int = 0
    replayed: bool = False
    output: Tensor | None = None
    created: bool = False
    each: Mapping[str, Reply] = field(default_factory=dict)


class Calls(Protocol):
    """A service. `form` is a media type, which does not matter without HTTP."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def create(self, name: str, config: dict[str, Any]) -> Reply: ...

    async def change(self, name: str, call: Call, form: str, group: tuple[str, int] | None = None) -> Reply: ...

    async def many(self, moments: Mapping[str, Mapping[str, Tensor]], key: str | None, form: str) -> Reply: ...

    async def eval(self, name: str, batch: Tensor, form: str) -> Reply: ...

    async def view(self, name: str) -> View | None: ...

    async def names(self) -> list[str]: ...


class DirectCalls:
    """`Layers` over a store, which is made anew each time it is opened."""

    def __init__(self, make_store: Callable[[], Any]) -> None:
        self._make_store = make_store
        self._context: AbstractAsyncContextManager[Layers]

    async def open(self) -> None:
        self._context = serving(self._make_store())
        self._layers = await self._context.__aenter__()

    async def close(self) -> None:
        await self._context.__aexit__(None, None, None)

    async def create(self, name: str, config: dict[str, Any]) -> Reply:
        async def create() -> Reply:
            snapshot, created = await self._layers.create(name, LayerConfig(**config))
            return Reply(version=snapshot.version, batches=snapshot.num_batches_tracked, created=created)

        return await _replied(create())

    async def change(self, name: str, call: Call, form: str, group: tuple[str, int] | None = None) -> Reply:
        return await _replied(self._change(name, call, GroupCall(*group) if group else None))

    async def _change(self, name: str, call: Call, group: GroupCall | None) -> Reply:
        match = None if call.match is None else frozenset({call.match})
        batches = self._layers.batches
        replayed = False
        match call.operation:
            case "train":
                done = await batches.train(name, _reads({"input": call.content}), call.key, group=group)
                output = to_torch(done.output)
                return Reply(None, done.version, done.num_batches_tracked, done.replayed, output)
            case "moments":
                folded = await batches.fold_moments(name, _reads(call.content), call.key)
                return Reply(None, folded.version, folded.num_batches_tracked, folded.replayed)
            case "reset":
                snapshot, replayed = await self._layers.reset(name, call.content, call.key, match)
            case "patch":
                snapshot = await self._layers.update(name, LayerUpdate(**call.content), match)
            case "put_state":
                snapshot = await self._layers.replace_state(name, _reads(call.content), match)
            case _:
                await self._layers.delete(name, match)
                return Reply()
        return Reply(None, snapshot.version, snapshot.num_batches_tracked, replayed)

    async def many(self, moments: Mapping[str, Mapping[str, Tensor]], key: str | None, form: str) -> Reply:
        sent = {name: {one: to_wire(tensor) for one, tensor in each.items()} for name, each in moments.items()}
        each = {}
        for name, result in (await self._layers.batches.fold_many(sent, key)).items():
            if isinstance(result, Exception):
                assert isinstance(result, RequestError)
                each[name] = Reply(result.name)
            else:
                each[name] = Reply(None, result.version, result.num_batches_tracked, result.replayed)
        return Reply(each=each)

    async def eval(self, name: str, batch: Tensor, form: str) -> Reply:
        async def evaluate() -> Reply:
            done = await self._layers.batches.eval(name, _reads({"input": batch}))
            return Reply(None, done.version, done.num_batches_tracked, output=to_torch(done.output))

        return await _replied(evaluate())

    async def view(self, name: str) -> View | None:
        try:
            layer = await self._layers.get(name)
        except LayerNotFound:
            return None
        tensors = {one: to_torch(tensor) for one, tensor in layer.tensors.items()}
        config, batches = layer.config.model_dump(), layer.num_batches_tracked
        return View(config, layer.version, batches, layer.samples_tracked, tensors, layer.created_at)

    async def names(self) -> list[str]:
        return [one.name for one in (await self._layers.list("", "", 100)).layers]


class HttpCalls:
    """The whole service, by ASGI or over a socket by the fast path."""

    def __init__(self, way: str) -> None:
        self._way = way

    async def open(self) -> None:
        self._stack = AsyncExitStack()
        service = await self._stack.enter_async_context(running(self._way))
        self._http = await self._stack.enter_async_context(service.client())

    async def close(self) -> None:
        await self._stack.aclose()

    async def create(self, name: str, config: dict[str, Any]) -> Reply:
        response = await self._http.put(f"/v1/layers/{name}", json=config)
        return _layer_reply(response)

    async def change(self, name: str, call: Call, form: str, group: tuple[str, int] | None = None) -> Reply:
        url, headers = f"/v1/layers/{name}", {}
        if call.match is not None:
            headers["If-Match"] = f'"{call.match}"'
        if call.key is not None:
            headers["Idempotency-Key"] = call.key
        match call.operation:
            case "train":
                query = {"group": group[0], "size": group[1]} if group else {}
                return await self._normalize(f"{url}/train", call.content, form, headers, query)
            case "moments":
                return _folded_reply(await self._send("POST", f"{url}/moments", call.content, _several(form), headers))
            case "reset":
                response = await self._http.post(f"{url}/reset", json={"what": call.content}, headers=headers)
            case "patch":
                response = await self._http.patch(url, json=call.content, headers=headers)
            case "put_state":
                response = await self._send("PUT", f"{url}/state", call.content, _several(form), headers)
            case _:
                response = await self._http.delete(url, headers=headers)
                return Reply() if response.status_code == 204 else _refusal(response)
        return _layer_reply(response)

    async def many(self, moments: Mapping[str, Mapping[str, Tensor]], key: str | None, form: str) -> Reply:
        headers = {} if key is None else {"Idempotency-Key": key}
        if form == JSON:
            layers = {
                name: {"count": int(each["count"]), "mean": _numbers(each["mean"]), "var": _numbers(each["var"])}
                for name, each in moments.items()
            }
            response = await self._http.post("/v1/moments", json={"layers": layers}, headers=headers)
        else:
            tensors = {f"{name}/{one}": tensor for name, each in moments.items() for one, tensor in each.items()}
            response = await self._send("POST", "/v1/moments", tensors, SAFETENSORS, headers)
        assert response.status_code == 200, response.text
        each = {}
        for name, result in response.json()["layers"].items():
            if "type" in result:
                each[name] = Reply(result["type"].removeprefix("/problems/"))
            else:
                each[name] = Reply(None, result["version"], result["num_batches_tracked"], result["replayed"])
        return Reply(each=each)

    async def eval(self, name: str, batch: Tensor, form: str) -> Reply:
        return await self._normalize(f"/v1/layers/{name}/eval", batch, form, {}, {})

    async def view(self, name: str) -> View | None:
        response = await self._http.get(f"/v1/layers/{name}")
        if response.status_code == 404:
            assert _refusal(response).problem == "layer-not-found"
            return None
        layer = response.json()
        state = await self._http.get(f"/v1/layers/{name}/state")
        assert state.headers["batchnorm-version"] == str(layer["version"])
        assert response.headers["etag"] == f'"{layer["version"]}"'
        decoded = decode(SAFETENSORS, bytearray(state.content), _DTYPES)
        tensors = {one: to_torch(tensor) for one, tensor in decoded.items()}
        for one in ("running_mean", "running_var", "weight", "bias"):
            shown = layer[one]
            assert (shown is None) == (one not in tensors)
            if shown is not None:
                assert torch.equal(_tensor(shown, tensors[one].dtype).nan_to_num(), tensors[one].nan_to_num())
        counters = layer["version"], layer["num_batches_tracked"], layer["samples_tracked"]
        return View(layer["config"], *counters, tensors, layer["created_at"])

    async def names(self) -> list[str]:
        return [one["name"] for one in (await self._http.get("/v1/layers")).json()["layers"]]

    async def _normalize(
        self, url: str, batch: Tensor, form: str, headers: dict[str, str], query: dict[str, Any]
    ) -> Reply:
        response = await self._send("POST", url, {"input": batch}, form, headers, query)
        if response.status_code != 200:
            return _refusal(response)
        assert response.headers["content-type"] == form
        replayed = response.headers.get("idempotent-replay") == "true"
        if form == JSON:
            document = response.json()
            told = document["version"], document["num_batches_tracked"]
            output = _tensor(document["output"], batch.dtype)
            output = output.reshape(batch.shape) if batch.numel() == 0 else output  # JSON has no shape (0, 3)
        else:
            told = int(response.headers["batchnorm-version"]), int(response.headers["num-batches-tracked"])
            output = to_torch(decode(form, bytearray(response.content), {"output": "float32"})["output"])
        assert response.headers["etag"] == f'"{told[0]}"'
        return Reply(None, *told, replayed, output)

    async def _send(
        self,
        method: str,
        url: str,
        tensors: Mapping[str, Tensor],
        form: str,
        headers: dict[str, str],
        query: dict[str, Any] | None = None,
    ) -> httpx.Response:
        content = b"".join(encode(form, {name: to_wire(tensor) for name, tensor in tensors.items()}))
        sent = {**headers, "Content-Type": form}
        return await self._http.request(method, url, content=content, headers=sent, params=query or {})


_DTYPES = dict.fromkeys(
    (
        *("running_mean", "running_var", "weight", "bias", "num_batches_tracked"),
        *("samples_tracked", "population_mean", "population_m2"),
    ),
    "float64",
)
_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}


def forms_for(tensor: Tensor, dtype: torch.dtype) -> list[str]:
    """The media types in which a batch keeps its dtype: JSON numbers are read in the layer's."""
    forms = [SAFETENSORS]
    forms += [JSON] if tensor.dtype == dtype else []
    forms += [NPY] if tensor.dtype != torch.bfloat16 else []
    return forms


def _several(form: str) -> str:
    return SAFETENSORS if form == NPY else form


def _reads(tensors: Mapping[str, Tensor]) -> Callable[[Mapping[str, str]], Any]:
    return lambda _: {name: to_wire(tensor) for name, tensor in tensors.items()}


async def _replied(call: Awaitable[Reply]) -> Reply:
    try:
        return await call
    except RequestError as error:
        return Reply(error.name)


def _refusal(response: httpx.Response) -> Reply:
    problem = response.json()
    name = problem["type"].removeprefix("/problems/")
    assert response.headers["content-type"] == PROBLEM_JSON
    assert response.headers["x-request-id"]
    assert response.status_code == problem["status"] == PROBLEMS[name].status < 500, response.text
    return Reply(name)


def _layer_reply(response: httpx.Response) -> Reply:
    if response.status_code not in (200, 201):
        return _refusal(response)
    layer = response.json()
    replayed = response.headers.get("idempotent-replay") == "true"
    return Reply(None, layer["version"], layer["num_batches_tracked"], replayed, created=response.status_code == 201)


def _folded_reply(response: httpx.Response) -> Reply:
    if response.status_code != 200:
        return _refusal(response)
    folded = response.json()
    replayed = response.headers.get("idempotent-replay") == "true"
    return Reply(None, folded["version"], folded["num_batches_tracked"], replayed)


def _numbers(vector: Tensor) -> list[Any]:
    return [number if math.isfinite(number) else _NAMES.get(number, "NaN") for number in vector.tolist()]


def _tensor(document: Any, dtype: torch.dtype) -> Tensor:
    """A JSON array, whose numbers that JSON lacks are strings. Every float32 is read back exactly by way of float64."""
    numbers = np.array(document, object)
    return torch.from_numpy(numbers.astype(np.float64)).to(dtype)
