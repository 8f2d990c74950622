"""Pins, history and rollback, and handles that only read one kept state."""

import itertools

import httpx
import numpy as np
import pytest
import torch

from batchnorm_client import (
    AsyncRemoteLayer,
    ConnectionFailed,
    DigestMismatch,
    InvalidRequest,
    LayerNotFound,
    LayerPinned,
    NoAnswer,
    PinExists,
    RemoteLayer,
    VersionMismatch,
    VersionNotFound,
)
from batchnorm_client.wire.headers import IDEMPOTENCY_KEY

BATCH = np.array([[1, 2, 3], [4, 5, 7], [-1, 0, 2]], np.float32)
OTHER = BATCH * 3 + 1
DIGEST = "sha-256:" + "0" * 64


@pytest.fixture
def pinned(layer):
    """A layer whose newest state is another one than the pinned one."""
    layer.train(BATCH)
    layer.pin("ckpt")
    layer.train(OTHER)
    return layer


def reads(handle):
    """What the calls that read give, by name."""
    return {
        "eval": lambda: handle.eval(OTHER).output,
        "eval_local": lambda: handle.eval_local(OTHER).output,
        "inverse": lambda: handle.inverse(OTHER).output,
        "inspect": lambda: np.array(handle.inspect().running_mean, np.float32),
        "state_dict": lambda: handle.state_dict()["running_mean"],
    }


def test_a_pin_is_what_a_checkpoint_stores(client, layer):
    layer.train(BATCH)
    before = {name: call() for name, call in reads(layer).items()}
    pin = layer.pin("ckpt-100k")
    document = layer.inspect()
    assert (pin.tag, pin.version, pin.digest) == ("ckpt-100k", document.version, document.digest)
    assert layer.eval(BATCH).digest == layer.eval_local(BATCH).digest == pin.digest
    layer.train(OTHER)
    layer.update(weight=[2.0, 2.0, 2.0], eps=0.5)
    for at, expect in itertools.product((pin.tag, pin.version, str(pin.version)), (None, pin.digest)):
        handle = client.layer(layer.name, at=at, expect=expect)
        for name, call in reads(handle).items():
            np.testing.assert_array_equal(call(), before[name], name)
        assert handle.eval(BATCH).digest == handle.eval_local(BATCH).digest == handle.inspect().digest == pin.digest
        assert handle.inspect() == document
    assert not np.array_equal(layer.eval(OTHER).output, before["eval"])


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"statistics": "population", "clip": 0.5},
        {"dtype": "float64", "channel_axis": -1, "eps": 0.1},
    ],
    ids=["defaults", "not affine", "untracked", "population that clips", "float64, channels last"],
)
def test_the_digest_that_is_computed_here_is_the_service_s(client, name, options, kind):
    layer = client.create_layer(name, 3, **options)
    batch = BATCH.astype(options.get("dtype", "float32"))
    layer.train(batch)
    pin = layer.pin("a")
    layer.train(batch * 2)
    handle = client.layer(name, at="a", expect=pin.digest)
    np.testing.assert_allclose(
        handle.eval_local(kind(batch)).output, handle.eval(kind(batch)).output, rtol=1e-5, atol=1e-6
    )
    assert handle.inspect().digest == pin.digest


def test_not_a_number_has_the_service_s_digest(client, name):
    """JSON does not have the bits of a NaN, which on x86 has a sign."""
    layer = client.create_layer(name, 1, non_finite="allow")
    for batch in ([[np.inf], [-np.inf]], [[1.0], [2.0]]):
        layer.train(np.array(batch, np.float32))
        digest = layer.inspect().digest
        handle = client.layer(name, expect=digest)
        assert np.isnan(handle.eval_local(np.ones((2, 1), np.float32)).output).all()


def test_the_newest_state_must_have_the_expected_digest(client, layer):
    layer.train(BATCH)
    handle = client.layer(layer.name, expect=layer.inspect().digest)
    for call in reads(handle).values():
        call()
    layer.train(OTHER)
    for name, call in reads(handle).items():
        with pytest.raises(DigestMismatch) as raised:
            call()
        fields = raised.value.fields
        assert (fields["expected"], fields["got"]) == (layer.inspect().digest, handle.expect), name


def test_a_thousand_wrong_pairs_of_checkpoint_and_layer(client, name):
    """A checkpoint's tag and digest, used with a layer or a tag that is not its own."""
    states, digests = [], set()
    for number in range(8):
        layer = client.create_layer(f"{name}.{number}", 2)
        for step in range(4):
            layer.train(np.array([[number, step], [1, 2], [step, 9]], np.float32))
            pin = layer.pin(f"ckpt-{step}")
            states.append((layer.name, pin))
            digests.add(pin.digest)
    assert len(digests) == 32
    batch = np.ones((3, 2), np.float32)
    wrong = [(here, there) for here, there in itertools.permutations(states, 2)] + [(one, None) for one in states]
    assert len(wrong) > 1000
    calls = itertools.cycle(["eval", "eval_local", "inverse", "inspect", "state_dict"])
    for (layer, pin), there in wrong:
        expect = there[1].digest if there else DIGEST
        handle = client.layer(layer, at=pin.tag, expect=expect)
        call = next(calls)
        with pytest.raises(DigestMismatch):
            getattr(handle, call)(*() if call in {"inspect", "state_dict"} else (batch,))
    for layer, pin in states:
        handle = client.layer(layer, at=pin.tag, expect=pin.digest)
        assert handle.eval(batch).version == handle.eval_local(batch).version == pin.version


def test_a_state_that_a_faulty_service_changed_is_noticed(way, connect, pinned):
    """`eval_local` and `inspect` compute the digest from the numbers, whatever the document says."""

    def falsify(request):
        answer = way(request)
        content = answer.content.replace(b'"running_var":[', b'"running_var":[1')
        return httpx.Response(answer.status_code, content=content, headers={"content-type": "application/json"})

    (pin,) = pinned.pins()
    handle = connect.over(falsify).layer(pinned.name, at="ckpt", expect=pin.digest)
    for call in ("eval_local", "inspect"):
        with pytest.raises(DigestMismatch):
            reads(handle)[call]()


CHANGES = {
    "train": lambda layer: layer.train(BATCH),
    "train_local": lambda layer: layer.train_local(BATCH),
    "fold_moments": lambda layer: layer.fold_moments(3, [0, 0, 0], [1, 1, 1]),
    "backward": lambda layer: layer.backward(BATCH, BATCH),
    "update": lambda layer: layer.update(eps=0.5),
    "reset": lambda layer: layer.reset(),
    "load_state_dict": lambda layer: layer.load_state_dict({}),
    "rollback": lambda layer: layer.rollback("ckpt"),
    "pin": lambda layer: layer.pin("again"),
    "unpin": lambda layer: layer.unpin("ckpt"),
    "delete": lambda layer: layer.delete(with_pins=True),
}


@pytest.mark.parametrize("chosen", [{"at": "ckpt"}, {"at": 2}, {"expect": DIGEST}], ids=str)
def test_a_handle_of_a_kept_state_only_reads(shaky, way, chosen):
    handle = shaky.layer("bn", **chosen)
    for name, change in CHANGES.items():
        with pytest.raises(ValueError, match=f"^{name}: .*'bn' was made with at= or expect="):
            change(handle)
    assert not way.sent


@pytest.mark.parametrize("kind", [RemoteLayer, AsyncRemoteLayer])
def test_every_method_either_reads_the_state_or_refuses(kind):
    methods = {name for name in dir(kind) if not name.startswith("_")}
    assert methods == {*CHANGES, *reads(None), "history", "pins", "drift"}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"at": ""}, "at"),
        ({"at": ".."}, "at"),
        ({"at": "a/b"}, "at"),
        ({"at": "a" * 201}, "at"),
        ({"at": -1}, "at"),
        ({"at": "a&expect=b"}, "at"),
        ({"expect": ""}, "expect"),
        ({"expect": DIGEST.upper()}, "expect"),
        ({"expect": f"{DIGEST}0"}, "expect"),
    ],
)
def test_what_names_no_state_is_refused_here(client, arguments, field):
    with pytest.raises(InvalidRequest) as raised:
        client.layer("bn", **arguments)
    assert raised.value.fields["field"] == field


@pytest.mark.parametrize("tag", ["", "..", "7", "a/b", "a" * 201, "a?b"])
def test_invalid_tags_are_refused_here(shaky, way, tag):
    layer = shaky.layer("bn")
    for call in (layer.pin, layer.unpin):
        with pytest.raises(InvalidRequest, match="is no tag"):
            call(tag)
    assert not way.sent


def test_what_a_handle_looks_like(client):
    assert "RemoteLayer('bn', at='a' at http" in repr(client.layer("bn", at="a"))
    assert "RemoteLayer('bn' at http" in repr(client.layer("bn"))


def test_eval_local_with_a_digest_reads_once(shaky, way, pinned):
    (pin,) = pinned.pins()
    handle = shaky.layer(pinned.name, at="ckpt", expect=pin.digest)
    first = handle.eval_local(BATCH)
    assert len(way.sent) == 1
    pinned.unpin("ckpt")
    pinned.pin("ckpt")  # another state
    np.testing.assert_array_equal(handle.eval_local(BATCH).output, first.output)
    assert len(way.sent) == 1
    with pytest.raises(DigestMismatch):
        handle.eval(BATCH)


def test_eval_local_with_a_tag_alone_asks_what_it_stands_for(shaky, way, pinned):
    handle = shaky.layer(pinned.name, at="ckpt")
    first = handle.eval_local(BATCH)
    assert handle.eval_local(BATCH).version == first.version
    assert way.headers[1]["if-none-match"] == f'"{first.version}"'
    pinned.unpin("ckpt")
    with pytest.raises(VersionNotFound):
        handle.eval_local(BATCH)
    pin = pinned.pin("ckpt")
    again = handle.eval_local(BATCH)
    assert (again.version, again.digest) == (pin.version, pin.digest) != (first.version, first.digest)


def test_a_state_that_had_the_wrong_digest_is_not_cached(client, layer):
    layer.train(BATCH)
    digest = layer.pin("a").digest
    layer.train(OTHER)
    handle = client.layer(layer.name, expect=digest)
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            handle.eval_local(BATCH)
    layer.rollback("a")
    assert handle.eval_local(BATCH).digest == digest


def test_what_is_not_kept(client, pinned):
    for name, call in reads(client.layer(pinned.name, at="none")).items():
        with pytest.raises(VersionNotFound):
            pytest.fail(f"{name}: {call()}")
    for call in (lambda: pinned.rollback("none"), lambda: pinned.pin("a", version=10**6), lambda: pinned.unpin("none")):
        with pytest.raises(VersionNotFound):
            call()
    with pytest.raises(LayerNotFound):
        client.layer("none", at="ckpt").eval(BATCH)


def test_pins(pinned):
    newest = pinned.pin("newest")
    with pytest.raises(PinExists) as raised:
        pinned.pin("ckpt")
    assert raised.value.fields["got"] == newest.version
    old = next(pin for pin in pinned.pins() if pin.tag == "ckpt")
    assert pinned.pin("ckpt", version=old.version) == old
    assert pinned.pin("second", version=old.version).digest == old.digest
    assert [pin.tag for pin in pinned.pins()] == ["ckpt", "newest", "second"]
    with pytest.raises(LayerPinned):
        pinned.delete()
    for tag in ("ckpt", "newest"):
        assert pinned.unpin(tag) is None
    assert [pin.tag for pin in pinned.pins()] == ["second"]
    pinned.delete(with_pins=True)
    with pytest.raises(LayerNotFound):
        pinned.pins()


def test_history(shaky, way, layer):
    """Every reset keeps the state before it."""
    for _ in range(4):
        layer.train(BATCH)
        layer.reset()
    handle = shaky.layer(layer.name)
    states = list(handle.history())
    versions = [state.version for state in states]
    assert len(way.sent) == 1
    assert versions == sorted(versions, reverse=True)
    assert (states[0].version, states[0].operation) == (layer.inspect().version, "reset")
    assert [state.operation for state in states].count("train") == 4
    assert list(handle.history(limit=3)) == states[:3]
    assert list(handle.history(limit=100, before=versions[2])) == states[3:]
    assert list(handle.history(limit=0)) == []
    assert {pin.digest for pin in [layer.pin("a", version=versions[1])]} == {states[1].digest}


def test_history_comes_in_pages(connect):
    """A service may give fewer than were asked for."""
    asked = []

    def answer(request):
        asked.append(dict(request.url.params))
        before = int(request.url.params.get("before", 5))
        entry = {"num_batches_tracked": 0, "samples_tracked": 0, "operation": "train", "digest": DIGEST}
        entry |= {"version": before - 1, "at": "2026-01-01T00:00:00Z"}
        return httpx.Response(200, json={"history": [entry], "next": before - 1 if before > 2 else None})

    layer = connect.over(answer).layer("bn")
    assert [state.version for state in layer.history()] == [4, 3, 2, 1]
    assert [query.get("before") for query in asked] == [None, "4", "3", "2"]
    asked.clear()
    assert [state.version for state in layer.history(limit=2)] == [4, 3]
    assert [query["limit"] for query in asked] == ["2", "1"]


@pytest.mark.parametrize("by", ["tag", "version", "digits"])
def test_rollback(pinned, by):
    (pin,) = pinned.pins()
    newest = pinned.inspect()
    with pytest.raises(VersionMismatch):
        pinned.rollback("ckpt", if_match=pin.version)
    back = pinned.rollback(
        {"tag": pin.tag, "version": pin.version, "digits": str(pin.version)}[by], if_match=newest.version
    )
    assert back == pinned.inspect()
    assert (back.digest, back.num_batches_tracked) == (pin.digest, 1)
    assert back.version > newest.version
    assert pinned.rollback(newest.version).digest == newest.digest, "a rollback can be undone"


class TestLostAnswers:
    """Between a real service and both clients: see test_lost_answers.py."""

    @pytest.fixture
    def layer(self, other, name):
        """Without faults and in somebody else's hands."""
        layer = other.create_layer(name, 3)
        layer.train(BATCH)
        return layer

    @pytest.fixture
    def there(self, shaky, layer):
        return shaky.layer(layer.name)

    @pytest.mark.parametrize("fault", ["unheard", "lost", "refused", 502, 503])
    def test_a_pin_is_of_the_state_that_the_first_attempt_found(self, way, there, layer, fault):
        before = layer.inspect()
        way.faults = [fault, fault, lambda _: layer.train(OTHER)] if fault == "unheard" else [fault, fault]
        pin = there.pin("a")
        assert (pin.version, pin.digest) == (before.version, before.digest)
        assert way.sent == ["PUT a"] * 3
        assert len({headers[IDEMPOTENCY_KEY] for headers in way.headers}) == 1
        assert layer.pins() == [pin]

    def test_a_pin_under_the_same_key_stays_the_same(self, there, layer):
        pin = there.pin("a", key="k")
        layer.train(OTHER)
        assert there.pin("a", key="k") == pin
        with pytest.raises(PinExists):
            there.pin("a")

    def test_a_rollback_happens_once(self, way, there, layer):
        layer.pin("a")
        layer.train(OTHER)
        way.faults = ["unheard", lambda _: layer.train(OTHER)]
        there.rollback("a")
        assert layer.inspect().num_batches_tracked == 2, "what was trained after it stays"
        assert way.sent == ["POST rollback"] * 2

    def test_reads_are_repeated(self, way, there, shaky, layer):
        layer.pin("a")
        kept = shaky.layer(layer.name, at="a")
        for call in (there.pins, lambda: list(there.history()), *reads(kept).values()):
            way.faults = ["unheard", 502]
            call()

    @pytest.mark.parametrize("fault", ["unheard", "refused"])
    def test_unpin_finds_that_it_was_done(self, way, there, layer, fault):
        layer.pin("a")
        way.faults = [fault]
        there.unpin("a")
        assert layer.pins() == []
        assert way.sent == (["DELETE a", "GET a"] if fault == "unheard" else ["DELETE a", "DELETE a"])

    def test_unpin_spares_the_next_pin_of_that_tag(self, way, there, layer):
        layer.pin("a")
        way.faults = ["unheard", lambda _: layer.pin("a")]
        with pytest.raises(NoAnswer) as raised:
            there.unpin("a")
        assert raised.value.outcome_unknown
        assert "there again" in raised.value.__notes__[0]
        assert len(layer.pins()) == 1

    def test_unpin_that_did_not_arrive(self, way, there, layer):
        layer.pin("a")
        way.faults = ["lost"]
        with pytest.raises(ConnectionFailed):
            there.unpin("a")
        assert len(layer.pins()) == 1

    def test_unpin_of_a_layer_that_went_with_it(self, way, there, layer):
        layer.pin("a")
        way.faults = ["unheard", lambda _: layer.delete()]
        there.unpin("a")

    def test_a_layer_deleted_with_its_pins(self, way, there, shaky, layer):
        layer.pin("a")
        way.faults = ["unheard"]
        there.delete(with_pins=True)
        assert list(shaky.layers(layer.name)) == []
