"""Followers of a layer, of both clients, against a real service."""

import contextlib
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from batchnorm_client import (
    BufferFull,
    Client,
    ConnectionFailed,
    DtypeMismatch,
    InvalidRequest,
    LayerNotFound,
    NonFinite,
    ShapeMismatch,
    StaleState,
    TimedOut,
    TooFewValues,
)
from batchnorm_client.core.followed import Followed
from client.harness import environment

NEVER = float("inf")
RNG = np.random.default_rng(17)


def batch(rows=4, channels=3):
    return RNG.normal(3, 2, (rows, channels)).astype(np.float32)


def until(holds):
    """Return when this holds; a test that waits in vain fails."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def raises(error, call):
    try:
        call()
    except error:
        return True
    return False


def moments(x):
    wide = x.astype(np.float64)
    return len(x), wide.mean(0), wide.var(0)


@pytest.fixture
def follow(client, lossy):
    """`follow(name)` makes a follower, which is closed at the end."""
    with contextlib.ExitStack() as stack:

        def follow(name, by=client, **options):
            follower = by.follow(name, **options)
            stack.callback(lambda: raises(Exception, lambda: follower.close(0)))
            return follower

        yield follow


class Lossy:
    """Requests to a service: those whose path ends with a word may go wrong.

    Attributes:
        faults: of the requests to come that fold moments: "lost", or "unheard" after they took effect.
        away: paths that cannot be reached.
        keys: of the requests that fold moments.
    """

    def __init__(self, url):
        self._http = httpx.Client(base_url=url, timeout=90)
        self.faults, self.away, self.keys = [], (), []

    def __call__(self, request):
        path = request.url.path
        if path.endswith(self.away):
            raise httpx.ConnectError("away", request=request)
        fault = None
        if path.endswith("/moments"):
            self.keys.append(request.headers["idempotency-key"])
            fault = self.faults.pop(0) if self.faults else None
        if fault == "lost":
            raise httpx.ReadError("lost", request=request)
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        target = re.sub("wait=[^&]*", "wait=0", request.url.raw_path.decode())  # this blocks the async client's loop
        answer = self._http.request(request.method, target, content=request.content, headers=headers)
        if fault == "unheard":
            raise httpx.ReadError("unheard", request=request)
        return httpx.Response(answer.status_code, content=answer.content, headers=answer.headers)


@pytest.fixture
def lossy(url):
    way = Lossy(url)
    yield way
    way._http.close()


@pytest.mark.parametrize("options", [{}, {"statistics": "population", "clip": 1.0}, {"channel_axis": -1}])
def test_eval_is_that_of_the_service(client, name, follow, options):
    layer = client.create_layer(name, 3, **options)
    layer.train(batch())
    follower = follow(name)
    x = batch()
    assert torch.equal(follower.eval(torch.from_numpy(x)), layer.eval(torch.from_numpy(x)).output)
    assert np.array_equal(follower.eval(x), layer.eval_local(x).output)
    assert np.array_equal(follower.eval(x[0]), follower.eval(x)[0])
    assert follower.eval(x[:0]).shape == (0, 3)


def test_it_follows(client, layer, other, follow):
    follower, x = follow(layer.name), batch()
    for change in (
        lambda handle: handle.train(batch()),
        lambda handle: handle.update(weight=[1.0, 2.0, 3.0], eps=0.1),
        lambda handle: handle.load_state_dict({"running_mean": np.ones(3, np.float32)}),
        lambda handle: handle.reset("all"),
    ):
        change(other.layer(layer.name))
        version = layer.inspect().version
        until(lambda version=version: follower.version == version)
        assert np.array_equal(follower.eval(x), layer.eval_local(x).output)
        assert follower.num_batches_tracked == layer.inspect().num_batches_tracked


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.3},
        {"momentum": None},
        {"dtype": "float64"},
        {"statistics": "population"},
        {"statistics": "population", "half_life": 20.0},
    ],
)
def test_observe_counts_what_is_not_sent_yet(client, name, follow, options):
    """As with a twin that folds each batch at once, before and after another one folds something in between."""
    layer, twin = client.create_layer(name, 3, **options), client.create_layer(f"{name}-twin", 3, **options)
    follower = follow(name, sync_every=NEVER)
    dtype = options.get("dtype", "float32")
    for _ in range(3):
        for x in (batch().astype(dtype) for _ in range(3)):
            twin.fold_moments(*moments(x))
            assert np.allclose(follower.observe(x), twin.eval_local(x).output, rtol=1e-6, atol=1e-6)
        assert follower.unsent == 3
        before = layer.inspect()
        follower.flush()
        after = layer.inspect()
        assert (after.version, after.num_batches_tracked) == (before.version + 1, before.num_batches_tracked + 3)
        assert follower.unsent == 0
    expected = twin.state_dict()
    for key, value in layer.state_dict().items():
        assert np.allclose(value, expected[key], rtol=1e-12), key
    if "statistics" not in options:
        assert np.array_equal(layer.state_dict()["running_var"], expected["running_var"])


def test_one_sample(client, name, follow):
    layer = client.create_layer(name, 3, statistics="population")
    samples = batch(50)
    follower = follow(name, cast="float32", sync_batches=20)
    for sample in samples.astype(np.float64):
        assert follower.observe(sample).shape == (3,)
    follower.close()
    assert np.allclose(layer.state_dict()["running_mean"], samples.mean(0, np.float64))
    assert np.allclose(layer.state_dict()["running_var"], samples.var(0, np.float64, ddof=1))


def test_frames_are_sent_by_number_and_by_time(client, layer, follow):
    by_number = follow(layer.name, sync_every=NEVER, sync_batches=3)
    for _ in range(3):
        by_number.observe(batch())
    until(lambda: layer.inspect().num_batches_tracked == 3)
    by_time = follow(layer.name, sync_every=0.01)
    by_time.observe(batch())
    until(lambda: layer.inspect().num_batches_tracked == 4)


def test_two_followers_see_each_other(client, name, follow):
    client.create_layer(name, 3, statistics="population")
    first, second = (follow(name, sync_every=0) for _ in range(2))
    batches = [batch() for _ in range(20)]
    for x in batches:
        first.observe(x)
        second.observe(x)
    until(lambda: first.num_batches_tracked == second.num_batches_tracked == 40)
    expected = (batches[0] - np.mean(batches, (0, 1))) / np.sqrt(np.var(batches * 2, (0, 1), ddof=1) * 159 / 159 + 1e-5)
    assert np.allclose(first.eval(batches[0]), expected, atol=1e-2)
    assert np.array_equal(first.eval(batches[0]), second.eval(batches[0]))


def test_a_frame_without_an_answer_is_sent_again_under_its_key(connect, lossy, layer, follow):
    lossy.faults = ["lost", "unheard", "unheard"]
    follower = follow(layer.name, connect.over(lossy), sync_every=NEVER)
    for _ in range(5):
        follower.observe(batch())
    follower.flush()
    assert layer.inspect().num_batches_tracked == 5
    assert len(lossy.keys) == 4
    assert len(set(lossy.keys)) == 1


def test_a_state_that_is_too_old(connect, lossy, layer, follow):
    follower = follow(layer.name, connect.over(lossy), max_staleness=0.2, timeout=0)
    follower.eval(batch())
    lossy.away = ("/state",)
    until(lambda: raises(StaleState, lambda: follower.eval(batch())))
    with pytest.raises(StaleState, match=f"'{layer.name}' was last confirmed") as caught:
        follower.observe(batch())
    assert isinstance(caught.value.__cause__, ConnectionFailed)
    assert follower.staleness > 0.2
    assert follower.unsent == 0
    lossy.away = ()
    until(lambda: not raises(StaleState, lambda: follower.eval(batch())))


def test_a_call_waits_for_a_newer_state(connect, lossy, layer, follow):
    follower = follow(layer.name, connect.over(lossy), max_staleness=0.2, timeout=30)
    lossy.away = ("/state",)
    until(lambda: follower.staleness > 0.2)
    back = threading.Timer(0.1, lambda: setattr(lossy, "away", ()))
    back.start()
    follower.eval(batch())
    back.join()
    assert lossy.away == ()


def test_memory_is_bounded(connect, lossy, layer, follow):
    follower = follow(layer.name, connect.over(lossy), sync_batches=3, max_unsent=3, timeout=0)
    lossy.away = ("/moments",)
    for _ in range(3):
        follower.observe(batch())
    with pytest.raises(BufferFull, match="3 observed batches"):
        follower.observe(batch())
    assert follower.unsent == 3
    with pytest.raises(TimedOut, match="3 observed batches"):
        follower.flush(0)
    lossy.away = ()
    follower.flush(30)
    assert layer.inspect().num_batches_tracked == 3
    until(lambda: not raises(BufferFull, lambda: follower.observe(batch())))


def test_a_layer_that_is_deleted_and_comes_again(client, layer, other, follow):
    follower = follow(layer.name, sync_every=NEVER)
    follower.observe(batch())
    other.layer(layer.name).delete()
    until(lambda: raises(LayerNotFound, lambda: follower.eval(batch())))
    assert raises(LayerNotFound, lambda: follower.observe(batch()))
    with pytest.raises(LayerNotFound) as caught:
        follower.flush()
    assert caught.value.__notes__ == [f"1 observed batches of layer {layer.name!r} are given up"]
    other.create_layer(layer.name, 5)
    until(lambda: not raises(LayerNotFound, lambda: follower.eval(batch(channels=5))))
    follower.observe(batch(channels=5))
    follower.close()
    assert layer.inspect().num_batches_tracked == 1


def test_what_another_layer_cannot_count_is_given_up(client, layer, other, follow):
    follower = follow(layer.name, sync_every=NEVER)
    follower.observe(batch())
    other.layer(layer.name).delete()
    other.create_layer(layer.name, 5)
    version = layer.inspect().version
    until(lambda: follower.version == version)
    with pytest.raises(ShapeMismatch, match="has 5 channels now, not 3"):
        follower.observe(batch(channels=5))
    assert follower.unsent == 0
    follower.observe(batch(channels=5))


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (batch(channels=4), ShapeMismatch),
        (batch().astype(np.float64), DtypeMismatch),
        (batch(1), TooFewValues),
        (batch()[0], TooFewValues),
        (batch() * np.float32("nan"), NonFinite),
        (batch() * np.float32(1e30), NonFinite),
        ([[1.0, 2.0, 3.0]], TypeError),
    ],
)
def test_what_cannot_be_folded_is_not_counted(layer, follow, x, error):
    follower = follow(layer.name)
    with pytest.raises(error):
        follower.observe(x)
    assert follower.unsent == 0


def test_options(client, name, follow):
    client.create_layer(name, 3, track_running_stats=False)
    with pytest.raises(InvalidRequest, match="running statistics"):
        follow(name)
    with pytest.raises(LayerNotFound):
        follow("nothing")
    for options in ({"max_staleness": 0}, {"sync_every": -1}, {"sync_batches": 0}, {"max_unsent": 10}, {"timeout": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            follow(name, **options)


def test_close(connect, lossy, layer, follow):
    follower = follow(layer.name, connect.over(lossy), sync_every=NEVER)
    follower.observe(batch())
    follower.close()
    follower.close()
    assert layer.inspect().num_batches_tracked == 1
    for call in (lambda: follower.eval(batch()), lambda: follower.observe(batch()), follower.flush):
        with pytest.raises(ConnectionFailed, match="closed"):
            call()
    late = follow(layer.name, connect.over(lossy), sync_every=NEVER)
    late.observe(batch())
    lossy.away = ("/moments",)
    with pytest.raises(TimedOut, match="1 observed batches"):
        late.close(0)
    assert late.unsent == 1


def test_a_frame_on_its_way_when_the_follower_is_closed_stays_unsent(connect, lossy, layer, follow):
    """Its batches were taken for settled: `unsent`, which says what may be lost, was 0."""
    lossy.faults = ["unheard"] * 1000
    follower = follow(layer.name, connect.over(lossy), sync_every=NEVER)
    follower.observe(batch())
    with pytest.raises(TimedOut):
        follower.flush(0)
    until(lambda: lossy.keys)
    with pytest.raises(TimedOut):
        follower.close(0)
    for task in follower._tasks if connect.kind == "sync" else ():
        task.join(30)
    assert follower.unsent == 1


def test_a_client_that_is_closed(connect, url, layer, follow):
    client = connect(url)
    follower = follow(layer.name, client, max_staleness=0.3)
    client.close()
    until(lambda: raises(ConnectionFailed, lambda: follower.eval(batch())))


def test_an_error_that_nobody_expects_is_raised_by_later_calls(client, layer, follow, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("not expected")

    monkeypatch.setattr(Followed, "arrived", fail)
    follower = follow(layer.name, max_staleness=0.3)
    until(lambda: raises(RuntimeError, lambda: follower.eval(batch())))
    assert f"layer {layer.name!r} is no longer followed" in caplog.text


def test_threads_share_a_follower(url, name):
    with Client(url) as client, client.follow(client.create_layer(name, 3).name, sync_batches=7) as follower:

        def observe():
            for _ in range(100):
                follower.observe(np.ones((2, 3), np.float32))

        threads = [threading.Thread(target=observe) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        follower.flush()
        assert client.layer(name).inspect().num_batches_tracked == 400


PROGRAM = Path(__file__).with_name("unclosed.py")


@pytest.mark.parametrize("way", ["exit", "multiprocessing"])
def test_a_process_that_exits_sends_what_it_has(url, layer, way):
    done = run(url, layer.name, way)
    assert (done.returncode, done.stderr) == (0, "")
    assert layer.inspect().num_batches_tracked == 3


@pytest.mark.parametrize("way", ["away", "async"])
def test_a_process_that_cannot_send_says_so(url, layer, way):
    done = run(url, layer.name, way)
    assert f"3 observed batches of layer {layer.name!r} were not sent: the process exits" in done.stderr
    assert layer.inspect().num_batches_tracked == 0


def run(*arguments):
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
