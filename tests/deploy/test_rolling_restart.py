"""Three replicas behind nginx are restarted one after the other while the Python client calls them.

`BATCHNORM_TEST_RESTARTS=10` restarts all of them ten times; docs/operations.md has what that printed.
"""

import os
import threading
import time
from contextlib import ExitStack

import httpx
import numpy as np
import pytest

from batchnorm_client import Client
from store import valkey_servers
from store.valkey_servers import free_port, wait_for

from .balancer import balancing, needs_nginx

RESTARTS = int(os.environ.get("BATCHNORM_TEST_RESTARTS", "1"))
THREADS = 3
CHANNELS = 4
WAIT = 30  # longer than a replica takes to stop


def batch(number):
    """Rows that no other number has: the sums tell whether each was counted once."""
    return np.random.default_rng(number).normal(number % 11, 1, size=(2 + number % 7, CHANNELS))


class Callers:
    """Threads that call the service until they are told to stop.

    Attributes:
        slowest: seconds of the longest call of each kind.
        errors: whatever was raised.
    """

    def __init__(self, url):
        self._url = url
        self._over = threading.Event()
        self._threads = []
        self._numbers = iter(range(1_000_000_000))
        self.trained = {}  # by number: what was told of the batch
        self.counts = {}
        self.slowest = {}
        self.errors = []

    def start(self, kind, call, threads=1):
        self.counts[kind], self.slowest[kind] = 0, 0.0
        for _ in range(threads):
            self._threads.append(threading.Thread(target=self._run, args=(kind, call)))
            self._threads[-1].start()

    def _run(self, kind, call):
        try:
            with Client(self._url) as client:
                repeat = call(client)
                while not self._over.is_set():
                    began = time.monotonic()
                    next(repeat)
                    self.slowest[kind] = max(self.slowest[kind], time.monotonic() - began)
                    self.counts[kind] += 1
        except BaseException as error:
            self.errors.append(error)
            raise

    def train(self, client):
        layer = client.layer("obs")
        while True:
            number = next(self._numbers)
            self.trained[number] = layer.train(batch(number)).num_batches_tracked
            yield

    def evaluate(self, client):
        layer, seen = client.layer("obs"), 0
        while True:
            acknowledged = len(self.trained)
            tracked = layer.eval(batch(0)).num_batches_tracked
            assert tracked >= max(seen, acknowledged)
            seen = tracked
            yield

    def follow(self, client):
        """Wait for each next state."""
        known = client.states(["obs"])
        while True:
            newer = client.states(["obs"], known=known, wait=WAIT)
            assert newer.versions["obs"] > known.versions["obs"]
            known = newer
            yield

    def wait_in_vain(self, client):
        """Wait for a layer that nobody trains. A replica that stops ends the wait, which then begins at another."""
        known = client.states(["quiet"])
        while True:
            same = client.states(["quiet"], known=known, wait=WAIT)
            assert same is known or self._over.is_set()
            yield

    def go_on(self):
        """Return when each kind of short call has been made some more times."""
        before = dict(self.counts)
        for kind in ("train", "eval", "follow"):
            wait_for(f"{kind} goes on", lambda kind=kind: self.errors or self.counts[kind] >= before[kind] + 10)

    def stop(self, release):
        """Let each thread end its call; `release` ends those that wait in vain."""
        self._over.set()
        release()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()


def gets_calls(replica):
    return 'route="/v1/layers/{name}/train"' in httpx.get(f"{replica.url}/metrics").text


@pytest.mark.slow
@needs_nginx
@pytest.mark.timeout(120 + 120 * RESTARTS)
def test_no_call_fails_and_every_batch_counts_once(start, tmp_path, measured):
    with ExitStack() as stack:
        store = stack.enter_context(valkey_servers.server(tmp_path / "valkey", appendfsync="always"))
        arguments = [("--store", store.url, "--port", str(free_port())) for _ in range(3)]
        replicas = [start(*each) for each in arguments]
        url = stack.enter_context(balancing(tmp_path / "nginx", [int(each[-1]) for each in arguments]))
        client = stack.enter_context(Client(url))
        for name in ("obs", "quiet"):
            client.create_layer(name, num_features=CHANNELS, statistics="population", dtype="float64")
        callers, stopping = Callers(url), []
        with ExitStack() as calling:
            calling.callback(callers.stop, lambda: client.layer("quiet").train(batch(0)))
            callers.start("train", callers.train, THREADS)
            callers.start("eval", callers.evaluate, THREADS)
            callers.start("follow", callers.follow)
            callers.start("wait", callers.wait_in_vain, THREADS)
            for number in [0, 1, 2] * RESTARTS:
                wait_for("every replica gets calls", lambda: all(map(gets_calls, replicas)))
                callers.go_on()
                began = time.monotonic()
                assert replicas[number].stop() == 0
                stopping.append(time.monotonic() - began)
                assert "Traceback" not in replicas[number].output
                callers.go_on()
                replicas[number] = start(*arguments[number])
            callers.go_on()
        assert callers.errors == []
        trained = callers.trained
        assert sorted(trained.values()) == list(range(1, len(trained) + 1))
        rows = np.concatenate([batch(number) for number in trained])
        layer = client.layer("obs").inspect()
        assert layer.num_batches_tracked == len(trained)
        np.testing.assert_allclose(layer.running_mean, rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, rows.var(axis=0, ddof=1), rtol=1e-12)
    calls = [f"{count} {kind} (slowest {callers.slowest[kind]:.2f} s)" for kind, count in callers.counts.items()]
    measured.append(f"{len(stopping)} restarts, slowest stop {max(stopping):.2f} s; none failed of {', '.join(calls)}")
