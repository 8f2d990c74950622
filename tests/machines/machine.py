"""Random calls on a few layers, which are compared with their models after each: invariants 1, 3, 4, 5 and 6."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

import torch
import uvloop
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from machines.calls import Calls, Reply, forms_for
from machines.comparison import assert_close, assert_equal, check
from machines.drawing import batches, batches_with_moments, configs, moments_of, patches, states
from machines.model import KEYED, Call, Model, Receipt

T = TypeVar("T")
NAMES = st.sampled_from(["a", "a", "a", "b"])
KEYS = st.sampled_from([None, None, None, "k1", "k2", "k3", "k4"])
MATCHES = st.sampled_from([None, None, 0, 1])  # how far the version in If-Match is off
FORMS = st.sampled_from([JSON, SAFETENSORS])
WHATS = st.sampled_from(["running_stats", "parameters", "all"])


def stranger() -> Model:
    """What a call is made for whose layer does not exist."""
    return Model(LayerConfig(num_features=2).model_dump(), 1, 0, None)


class Machine(RuleBasedStateMachine):
    """The rules. A subclass says how calls are made."""

    uvloop: ClassVar[bool] = False

    def make_calls(self) -> Calls:
        """The service, not yet open."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if self.uvloop else None)
        self.calls = self.make_calls()
        self.models: dict[str, Model] = {}
        self.highest: dict[str, int] = {}  # version of each name, over all layers that had it
        self.created_as: dict[str, dict[str, Any]] = {}
        self.sent: list[tuple[str, Call]] = []  # with a key
        self.groups = 0
        self.run(self.calls.open())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        try:
            self.run(self.calls.close())
        finally:
            self.runner.close()

    # ---------------------------------------------------------------------------------------------------- rules

    @initialize(a=configs(), b=configs())
    def create_both(self, a: tuple[dict[str, Any], int], b: tuple[dict[str, Any], int]) -> None:
        self.create("a", a)
        self.create("b", b)

    @rule(name=NAMES, config=configs(), again=st.booleans())
    def create_or_find(self, name: str, config: tuple[dict[str, Any], int], again: bool) -> None:
        if again and name in self.models:
            config = self.created_as[name], self.models[name].dimensions
        self.create(name, config)

    def create(self, name: str, config: tuple[dict[str, Any], int]) -> None:
        chosen, dimensions = config
        reply = self.run(self.calls.create(name, chosen))
        model = self.models.get(name)
        if model is None:
            assert reply.problem is None
            assert reply.created
            assert reply.batches == 0
            assert reply.version > self.highest.get(name, 0)
            view = self.run(self.calls.view(name))
            assert view is not None
            self.models[name] = Model(dict(chosen), dimensions, reply.version, view.created)
            self.created_as[name], self.highest[name] = chosen, reply.version
        elif self.created_as[name] == chosen:
            assert not reply.created
            assert (reply.problem, reply.version, reply.batches) == (None, model.version, model.batches)
        else:
            assert reply.problem == "layer-exists"

    @rule(name=NAMES, key=KEYS, data=st.data())
    def train(self, name: str, key: str | None, data: st.DataObject) -> None:
        self.change(name, Call("train", data.draw(batches(self.like(name))).tensor(), key), data)

    @rule(name=NAMES, key=KEYS, data=st.data())
    def fold_moments(self, name: str, key: str | None, data: st.DataObject) -> None:
        like = self.like(name)
        content = moments_of(data.draw(batches_with_moments(like)), like.axis)
        self.change(name, Call("moments", content, key), data)

    @rule(name=NAMES, what=WHATS, key=KEYS, off=MATCHES, data=st.data())
    def reset(self, name: str, what: str, key: str | None, off: int | None, data: st.DataObject) -> None:
        self.change(name, Call("reset", what, key, self.version(name, off)), data)

    @rule(name=NAMES, off=MATCHES, data=st.data())
    def patch(self, name: str, off: int | None, data: st.DataObject) -> None:
        fields = data.draw(patches(self.like(name)))
        self.change(name, Call("patch", fields, match=self.version(name, off)), data)

    @rule(name=NAMES, off=MATCHES, data=st.data())
    def put_state(self, name: str, off: int | None, data: st.DataObject) -> None:
        tensors, flaw = data.draw(states(self.like(name)))
        self.change(name, Call("put_state", tensors, match=self.version(name, off), flaw=flaw), data)

    @rule(name=NAMES, off=MATCHES, config=configs(), create=st.integers(0, 4), data=st.data())
    def delete(
        self, name: str, off: int | None, config: tuple[dict[str, Any], int], create: int, data: st.DataObject
    ) -> None:
        """Mostly the name gets a new layer at once: calls on layers that do not exist show little."""
        self.change(name, Call("delete", match=self.version(name, off)), data)
        if create and name not in self.models:
            self.create(name, config)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        """The same call under its key, in another form on the wire; perhaps for another layer of that name."""
        name, call = data.draw(st.sampled_from(self.sent))
        self.change(name, call, data)

    @rule(name=NAMES, data=st.data())
    def train_together(self, name: str, data: st.DataObject) -> None:
        """Calls at once, which may share a commit. The state is torch's, fed in the order of their batch numbers."""
        like = self.like(name)
        drawn = data.draw(st.lists(st.tuples(batches(like), KEYS), min_size=2, max_size=5))
        calls = [Call("train", batch.tensor(), key) for batch, key in drawn]
        calls += [calls[0]] * data.draw(st.integers(0, 1))
        forms = [data.draw(st.sampled_from(self.forms(like, call))) for call in calls]
        before = like.version

        async def together() -> list[Reply]:
            sent = zip(calls, forms, strict=True)
            return await asyncio.gather(*(self.calls.change(name, call, form) for call, form in sent))

        replies = sorted(
            zip(calls, self.run(together()), strict=True),
            key=lambda each: (each[1].problem is not None, each[1].replayed, each[1].batches),
        )
        for call, reply in replies:
            self.settle(name, call, reply, before)

    @rule(name=NAMES, data=st.data(), keyed=st.booleans())
    def train_in_a_group(self, name: str, data: st.DataObject, keyed: bool) -> None:
        """Two shards of one batch; then again, if they have keys."""
        model = self.models.get(name)
        if model is None:
            return
        drawn = data.draw(batches(model, ("plain",)))
        whole = drawn.tensor()
        at = data.draw(st.integers(1, len(whole) - 1))
        self.groups += 1
        keys = [f"group{self.groups}member{member}" if keyed else None for member in range(2)]
        shards = [Call("train", part, key) for part, key in zip((whole[:at], whole[at:]), keys, strict=True)]

        async def meet() -> list[Reply]:
            group = f"group{self.groups}", 2
            return await asyncio.gather(*(self.calls.change(name, shard, SAFETENSORS, group) for shard in shards))

        replies = self.run(meet())
        if problems := model.refusals(Call("train", whole)):
            assert all(reply.problem in problems for reply in replies)
            return
        output, tracks, before = model.output(whole), model.tracks, model.version
        model.apply(Call("moments", moments_of(drawn, model.axis)))
        told = {(reply.problem, reply.replayed, reply.version, reply.batches) for reply in replies}
        assert told == {(None, False, replies[0].version, model.batches)}
        self.advance(name, replies[0].version, before, changed=tracks)
        assert_close(torch.cat([reply.output for reply in replies if reply.output is not None]), output)
        if keyed:
            again = {(reply.problem, reply.replayed, reply.version, reply.batches) for reply in self.run(meet())}
            assert again == {(None, True, model.version, model.batches)}

    @rule(names=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True), key=KEYS, data=st.data())
    def fold_many(self, names: list[str], key: str | None, data: st.DataObject) -> None:
        """Moments of several layers, one of which does not exist."""
        likes = {name: self.like(name) for name in names}
        sent = {name: moments_of(data.draw(batches_with_moments(like)), like.axis) for name, like in likes.items()}
        reply = self.run(self.calls.many(sent, key, data.draw(FORMS)))
        assert reply.each.keys() == sent.keys()
        for name, content in sent.items():
            self.settle(name, Call("moments", content, key), reply.each[name])

    @rule(name=NAMES, data=st.data())
    def eval(self, name: str, data: st.DataObject) -> None:
        like = self.like(name)
        batch = data.draw(batches(like)).tensor()
        view = self.run(self.calls.view(name))
        reply = self.run(self.calls.eval(name, batch, data.draw(st.sampled_from(forms_for(batch, like.dtype)))))
        if view is None:
            assert reply.problem == "layer-not-found"
        elif problems := like.refusals_of_eval(batch):
            assert reply.problem in problems
        else:
            assert (reply.problem, reply.version, reply.batches) == (None, like.version, like.batches)
            assert reply.output is not None
            running = {one: tensor for one, tensor in view.tensors.items() if one.startswith("running")}
            assert_equal(reply.output, like.eval(batch, running))

    # ----------------------------------------------------------------------------------------------- invariants

    @invariant()
    def every_layer_is_as_its_model(self) -> None:
        for name in ("a", "b"):
            view, model = self.run(self.calls.view(name)), self.models.get(name)
            assert (view is None) == (model is None)
            if view is not None and model is not None:
                check(model, view)
        assert self.run(self.calls.names()) == sorted(self.models)

    # -------------------------------------------------------------------------------------------------- helpers

    def like(self, name: str) -> Model:
        """The layer's model; that of another layer if there is none."""
        return self.models.get(name) or stranger()

    def version(self, name: str, off: int | None) -> int | None:
        return None if off is None else self.like(name).version + off

    def forms(self, model: Model, call: Call) -> list[str]:
        if call.operation == "train":
            return forms_for(call.content, model.dtype)
        return [SAFETENSORS] if call.flaw == "dtype-mismatch" else [JSON, SAFETENSORS]

    def change(self, name: str, call: Call, data: st.DataObject) -> None:
        form = data.draw(st.sampled_from(self.forms(self.like(name), call)))
        self.settle(name, call, self.run(self.calls.change(name, call, form)))

    def settle(self, name: str, call: Call, reply: Reply, before: int | None = None) -> None:
        """Compare what a caller was told with the model, and make the same change to that.

        Args:
            name: the layer.
            call: what was sent.
            reply: what came back.
            before: a version that was there before the call; by default the newest.
        """
        model = self.models.get(name)
        if model is None:
            assert reply.problem == "layer-not-found"
            return
        problems = model.refusals(call)
        receipt = model.receipts.get(call.key) if call.key else None
        if receipt is not None and receipt.fingerprint == call.fingerprint:
            assert (reply.problem, reply.replayed) == (None, True)
            assert (reply.version, reply.batches) == receipt[1:]
            if call.operation == "train":
                assert reply.output is not None
                assert_equal(reply.output, model.output(call.content))
            return
        if receipt is not None:
            problems.add("idempotency-key-reused")
        if problems:
            assert reply.problem in problems
            return
        assert (reply.problem, reply.replayed) == (None, False)
        if call.operation == "delete":
            del self.models[name]
            return
        folds = call.operation in ("train", "moments")
        changed = model.tracks or not folds
        output = model.apply(call)
        assert reply.batches == model.batches
        if output is not None:
            assert reply.output is not None
            assert_equal(reply.output, output)
        self.advance(name, reply.version, model.version if before is None else before, changed=changed)
        if call.key and call.operation in KEYED:
            model.receipts[call.key] = Receipt(call.fingerprint, reply.version, reply.batches)
            self.sent.append((name, call))

    def advance(self, name: str, version: int, before: int, *, changed: bool) -> None:
        """A commit has a version that is newer than what was there before, and that no layer of this name had."""
        model = self.models[name]
        assert model.version <= version
        assert version > before if changed else version == before
        model.version = self.highest[name] = version
