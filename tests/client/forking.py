"""Uses a client before and after forks, and checks in every process what comes back: a program for test_forks.py.

    python forking.py URL WAY [CERTIFICATE]

Ways: sync; async; uvloop; busy, forked while other threads are in calls; locked, while another thread holds the locks
of the pool; torch, a module; waiting, while its moments wait to be sent; follow, a follower.
"""

import asyncio
import gc
import itertools
import os
import signal
import ssl
import sys
import threading
import traceback

import numpy as np
import numpy.random
import uvloop
from httpcore._synchronization import Lock, ThreadLock

from batchnorm_client import AsyncClient, Client

CHILDREN = 3
CALLS = 300
TRAINED = 20


def batches(process):
    """Batches that no other process has."""
    rng = np.random.default_rng(process)
    return (rng.normal(size=(4, 3)).astype(np.float32) for _ in itertools.count())


def check(batch, output):
    """Running mean 0 and variance 1."""
    np.testing.assert_allclose(output, batch / np.sqrt(1 + 1e-5), rtol=1e-6)


def evaluate(layer, process):
    for batch in itertools.islice(batches(process), CALLS):
        check(batch, layer.eval(batch).output)
        check(batch, layer.eval_local(batch).output)


def train(client):
    """The same batch in every process, so that a key that came twice would not count twice."""
    layer = client.layer("trained")
    assert not any(layer.train(np.eye(3, dtype=np.float32)).replayed for _ in range(TRAINED))


def child(work):
    """Fork, and do this in the child."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(100)  # a deadlock
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def join(children):
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)


def sync(client):
    layer = client.layer("bn")
    evaluate(layer, 0)

    def work(process):
        evaluate(layer, process)
        train(client)
        client.close()

    children = [child(lambda process=process: work(process)) for process in range(1, CHILDREN + 1)]
    children.append(child(client.close))
    evaluate(layer, 0)
    train(client)
    join(children)
    evaluate(layer, 0)
    assert layer.inspect().num_batches_tracked == 0
    assert client.layer("trained").inspect().num_batches_tracked == TRAINED * (CHILDREN + 1)


def busy(client):
    """Threads of the parent are inside of calls at every fork."""
    layer, stop, failed, calling = client.layer("bn"), threading.Event(), [], threading.Barrier(5)

    def work(process):
        try:
            for number, batch in enumerate(batches(process)):
                check(batch, layer.eval(batch).output)
                if number == 0:
                    calling.wait()
                if stop.is_set():
                    return
        except BaseException:
            failed.append(process)
            raise

    threads = [threading.Thread(target=work, args=(100 + index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    calling.wait()
    try:
        join([child(lambda process=process: evaluate(layer, process)) for process in range(1, CHILDREN + 1)])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def locked(client):
    """Another thread holds every lock that there is when the process forks."""
    layer, held, free = client.layer("bn"), threading.Event(), threading.Event()
    evaluate(layer, 0)

    def hold():
        locks = [each for each in gc.get_objects() if isinstance(each, Lock | ThreadLock)]
        assert len(locks) > 2
        for lock in locks:
            lock.__enter__()
        held.set()
        free.wait()
        for lock in locks:
            lock.__exit__()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    children = [child(lambda process=process: evaluate(layer, process)) for process in range(1, CHILDREN + 1)]
    join(children)
    free.set()
    thread.join()
    evaluate(layer, 0)


def torch(client):
    """A module that a child inherits."""
    import torch  # noqa: PLC0415 - the other ways need not wait for it

    from batchnorm_client.torch import RemoteBatchNorm1d  # noqa: PLC0415

    torch.set_num_threads(1)
    module = RemoteBatchNorm1d(3, client=client, name="module").eval()

    def work(process):
        for batch in itertools.islice(batches(process), CALLS):
            check(batch, module(torch.from_numpy(batch)).detach().numpy())

    work(0)
    children = [child(lambda process=process: work(process)) for process in range(1, CHILDREN + 1)]
    work(0)
    join(children)


def waiting(client):
    """Moments of a model wait to be sent, and another thread is sending, when the process forks."""
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    from batchnorm_client.torch import convert_batchnorm, flush  # noqa: PLC0415

    torch.set_num_threads(1)
    local = nn.Sequential(nn.BatchNorm1d(3, affine=False))
    model = convert_batchnorm(local, client, "waiting.", compute="local", existing="overwrite")
    model[0](torch.eye(3))  # not by way of the root, whose forward pass would send them

    def work():
        flush(model)
        model(torch.eye(3))

    sending = model[0]._pending._sending
    with sending:
        children = [child(work) for _ in range(CHILDREN)]
        join(children)
    flush(model)
    assert client.layer("waiting.0").inspect().num_batches_tracked == 1 + CHILDREN


def follow(client):
    """A follower that has observed what it has not sent, and is sending, when the process forks."""
    client.create_layer("followed", 3)
    follower = client.follow("followed", sync_every=float("inf"))
    batch = np.eye(3, dtype=np.float32)
    for _ in range(TRAINED):
        follower.observe(batch)

    def work():
        assert follower.unsent == 0
        for _ in range(TRAINED):
            follower.observe(batch)
            follower.eval(batch)
        follower.close()

    with follower._lock, follower._changes._condition:
        children = [child(work) for _ in range(CHILDREN)]
        join(children)
    follower.close()
    assert client.layer("followed").inspect().num_batches_tracked == TRAINED * (CHILDREN + 1)


async def asynchronous(client):
    layer = client.layer("bn")

    async def some(process):
        for batch in itertools.islice(batches(process), CALLS):
            check(batch, (await layer.eval(batch)).output)

    async def work(process):
        await some(process)
        await client.aclose()

    await some(0)
    children = [child(lambda process=process: asyncio.run(work(process))) for process in range(1, CHILDREN + 1)]
    children.append(child(lambda: asyncio.run(client.aclose())))
    await some(0)
    await asyncio.to_thread(join, children)
    await some(0)
    await client.aclose()


def main(url, way, certificate=None):
    options = {"verify": ssl.create_default_context(cafile=certificate)} if certificate else {}
    with Client(url, **options) as client:
        for name in ("bn", "trained"):
            client.create_layer(name, 3, affine=False).reset()
        if way not in ("async", "uvloop"):
            {"sync": sync, "busy": busy, "locked": locked, "torch": torch, "waiting": waiting, "follow": follow}[way](
                client
            )
    if way == "async":
        asyncio.run(asynchronous(AsyncClient(url, **options)))
    elif way == "uvloop":
        uvloop.run(asynchronous(AsyncClient(url, **options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
