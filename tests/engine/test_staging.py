"""The way to a device and back, without a device: copies that are done only when somebody waits for them.

What real copies do is in `test_cuda.py`.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import NonFinite, TooFewValues
from batchnorm_service.engine import device_moments, layout, staging
from batchnorm_service.engine.gradients import backward_step, gradient_sums, merge_sums, shard_backward
from batchnorm_service.engine.inverse import inverse_step
from batchnorm_service.engine.normalize import (
    eval_statistics,
    eval_step,
    normalize_with,
    output_parameters,
    shard_moments,
    train_step,
)
from batchnorm_service.engine.running_statistics import fold
from batchnorm_service.engine.staging import Staging, staged
from batchnorm_service.engine.state import initial_state

HERE = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Lazy:
    """Copies nothing before `wait`, as late as a device may; in between there is rubbish in the target."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.waits = 0
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.sizes.append(nbytes)
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.queued.append((target, source))

    def wait(self) -> None:
        self.waits += 1
        for target, source in self.queued:
            target.copy_(source)
        self.queued.clear()


class Eager(Lazy):
    """Uploads at once, so that kernels of the CPU can stand in for a device's; downloads as late as `Lazy`."""

    def __init__(self) -> None:
        super().__init__()
        self._memory: dict[int, torch.Tensor] = {}  # kept, so that no other tensor comes to lie there

    def pinned(self, nbytes: int) -> torch.Tensor:
        buffer = super().pinned(nbytes)
        self._memory[buffer.untyped_storage().data_ptr()] = buffer
        return buffer

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.untyped_storage().data_ptr() in self._memory:
            target.fill_(0xFF)
            # What was computed lies on the device; kernels queued later do not change it, so it may be read now.
            super().copy(target, source.clone())
        else:
            target.copy_(source)


# ------------------------------------------------------------------------------------------------------------ buffer


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
def test_what_goes_there_comes_back(dtype):
    queue = Lazy()
    way = Staging(queue)
    batch = torch.arange(60).to(dtype).reshape(3, 4, 5)
    original = batch.clone()
    there = way.upload(batch, HERE)
    batch.zero_()  # it was read before `upload` returned
    (back,) = way.download(there)
    assert torch.equal(back, original)
    assert back.dtype == dtype
    assert queue.waits == 1


def test_many_tensors_share_one_wait():
    queue = Lazy()
    way = Staging(queue)
    tensors = [torch.randn(size) for size in (1, 7, 1000, 64)]
    back = way.download(*(way.upload(tensor, HERE) for tensor in tensors))
    assert all(map(torch.equal, back, tensors))
    assert queue.waits == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda batch: batch,
        lambda batch: batch.movedim(-1, 1),
        lambda batch: batch[1:],
        lambda batch: batch[:, ::2],
        lambda batch: batch[0, 0, 0].expand(3, 6),
        lambda batch: batch[:0],
        lambda batch: batch.sum(),
    ],
    ids=["contiguous", "channels last", "offset", "gaps", "expanded", "empty", "scalar"],
)
def test_any_layout(view):
    tensor = view(torch.randn(4, 5, 3, 6))
    (back,) = Staging(Lazy()).download(tensor)
    assert torch.equal(back, tensor)
    assert back.stride() == torch.empty_like(tensor).stride()
    there = (way := Staging(Lazy())).upload(tensor, HERE)
    way.settle()
    assert torch.equal(there, tensor)
    assert there.is_contiguous()


def test_the_buffer_is_reused_and_grows_to_what_is_needed():
    queue = Lazy()
    way = Staging(queue)
    for nbytes in (100, 1000, 3 << 20, 3 << 20, 100):
        tensor = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
        assert torch.equal(way.download(way.upload(tensor, HERE))[0], tensor)
    assert queue.sizes == [1 << 20, 4 << 20]


def test_a_buffer_that_is_outgrown_within_a_call_keeps_what_the_device_has_not_read():
    queue = Lazy()
    way = Staging(queue)
    first, second = torch.randn(200_000), torch.randn(200_000)
    there = way.upload(first, HERE), way.upload(second, HERE)
    assert len(queue.sizes) == 2
    back = way.download(*there)
    assert torch.equal(back[0], first)
    assert torch.equal(back[1], second)
    assert queue.waits == 1


def test_what_does_not_fit_goes_through_in_pieces():
    queue = Lazy()
    way = Staging(queue, max_bytes=1024)
    batch, vector = torch.randn(1000), torch.randn(10)
    there = way.upload(batch, HERE), way.upload(vector, HERE)
    back = way.download(*there)
    assert torch.equal(back[0], batch)
    assert torch.equal(back[1], vector)
    assert queue.sizes == [1024]
    assert queue.waits > 1


@given(
    calls=st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=4), min_size=1, max_size=6),
    most=st.sampled_from([256, 1000, 4096, 1 << 27]),
)
def test_no_call_sees_the_data_of_another(calls, most):
    queue = Lazy()
    way = Staging(queue, most)
    kept = []
    for sizes in calls:
        sent = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
        kept.append((sent, way.download(*(way.upload(tensor, HERE) for tensor in sent))))
    for sent, back in kept:
        assert all(map(torch.equal, back, sent))
    assert sum(queue.sizes) <= 2 * most


def test_settling_waits_only_for_what_was_not_waited_for():
    queue = Lazy()
    way = Staging(queue)
    way.settle()
    assert queue.waits == 0
    way.upload(torch.ones(3), HERE)
    way.settle()
    assert queue.waits == 1
    way.download(way.upload(torch.ones(3), HERE))
    way.settle()
    assert queue.waits == 2


# ----------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def no_cuda(monkeypatch):
    """`staged` with `Eager` queues instead of streams; the queues, as they are made."""
    made = []

    class Queue(Eager):
        def __init__(self, device):
            super().__init__()
            self.stream = self
            made.append(self)

    monkeypatch.setattr(staging, "CudaQueue", Queue)
    monkeypatch.setattr(staging, "_thread_staging", staging._ThreadStaging())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return made


def test_staged_takes_tensors_there_and_leaves_the_rest(no_cuda):
    batch, empty, state = torch.ones(3), torch.ones(0, 3), object()

    def function(a, b, c, *, key):
        assert a is state
        assert torch.equal(b, batch)
        assert b is not batch
        assert c is empty
        return key

    assert staged(HERE, function, state, batch, empty, key=7) == 7


def test_a_call_that_fails_leaves_nothing_behind(no_cuda):
    with pytest.raises(ZeroDivisionError):
        staged(HERE, lambda _: 1 / 0, torch.ones(3))
    (queue,) = no_cuda
    assert queue.waits == 1


def test_every_thread_has_its_own_and_keeps_it(no_cuda):
    together = threading.Barrier(4)

    def call(seed):
        own = staging.staging(torch.device("cpu", 0))
        for n in range(25):
            batch = torch.full((1000 + n,), float(100 * seed + n))

            def function(there):
                together.wait()
                return staging.staging(torch.device("cpu", 0)).download(there * 2)[0]

            assert torch.equal(staged(HERE, function, batch), 2 * batch)
        return own

    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(call, range(4))))) == 4
    assert len(no_cuda) == 4
    assert all(len(queue.sizes) == 1 for queue in no_cuda)


# ------------------------------------------------------------------------------------------------------------ engine


class Elsewhere(torch.Tensor):
    """As good as on a device: whatever would make the CPU wait for a value fails."""

    is_cpu = property(lambda _: False)
    device = property(lambda _: torch.device("cpu", 0))

    def _waits(self, *_):
        raise AssertionError("this waits for the device")

    cpu = item = tolist = numpy = nonzero = __bool__ = __float__ = __int__ = _waits


class Recording(Staging):
    """What `Elsewhere` tensors are copied by."""

    def download(self, *tensors):
        return super().download(*(tensor.as_subclass(torch.Tensor) for tensor in tensors))


@pytest.fixture
def queue(monkeypatch):
    queue = Eager()
    way = Recording(queue)
    monkeypatch.setattr(layout, "staging", lambda _: way)
    monkeypatch.setattr(device_moments, "_CHUNK", 100)
    return queue


def layer(dtype=torch.float32, **config):
    name = "float64" if dtype == torch.float64 else "float32"
    state = initial_state(LayerConfig(num_features=3, dtype=name, **config))
    if state.weight is not None:
        state = state._replace(weight=torch.tensor([0.5, 2, 1]).to(state.dtype), bias=state.bias + 1)
    return state


def trained(state, batch):
    return fold(state, train_step(state, batch).moments)


def there(*tensors):
    return [tensor.as_subclass(Elsewhere) for tensor in tensors]


def same(a, b):
    """Equal, and what came from a device is ordinary memory on the CPU."""
    torch.testing.assert_close(b, a, rtol=1e-9 if a.dtype == torch.float64 else 0, atol=0)
    assert type(b) is torch.Tensor


SHAPES = {"rows": ((16, 3), 1), "images": ((4, 3, 5, 6), 1), "channels last": ((4, 5, 6, 3), -1)}
CONFIGS = [
    {},
    {"statistics": "population"},
    {"affine": False},
    {"affine": False, "track_running_stats": False},
    {"clip": 1.0},
    {"non_finite": "allow"},
]


@pytest.fixture(params=SHAPES, ids=str)
def batches(request):
    shape, axis = SHAPES[request.param]
    random = torch.Generator().manual_seed(0)
    return axis, [3 * torch.randn(shape, generator=random, dtype=torch.float64) + 1 for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_train_step(queue, batches, config, dtype):
    axis, (batch, _) = batches
    state, batch = layer(dtype, channel_axis=axis, **config), batch.to(dtype)
    here, away = train_step(state, batch), train_step(state, *there(batch))
    for name in ("output", "mean", "invstd"):
        same(getattr(here, name), getattr(away, name))
    for name in ("mean", "var"):
        same(getattr(here.moments, name), getattr(away.moments, name))
    assert (away.moments.count, away.moments.correction) == (here.moments.count, here.moments.correction)
    assert queue.waits == 1


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_eval_and_its_statistics(queue, batches, config):
    axis, (batch, other) = batches
    state = trained(layer(torch.float64, channel_axis=axis, **config), other)
    same(eval_step(state, batch), eval_step(state, *there(batch)))
    assert queue.waits == 1
    here, away = eval_statistics(state, batch), eval_statistics(state, *there(batch))
    assert here.keys() == away.keys()
    for name in here:
        same(here[name], away[name])


def test_inverse(queue, batches):
    axis, (batch, other) = batches
    state = trained(layer(torch.float64, channel_axis=axis), other)
    same(inverse_step(state, batch), inverse_step(state, *there(batch)))
    assert queue.waits == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_backward(queue, batches, config, training):
    axis, (batch, grad) = batches
    state = trained(layer(torch.float64, channel_axis=axis, **config), grad)
    here = backward_step(state, batch, grad, training=training)
    away = backward_step(state, *there(batch, grad), training=training)
    for one, other in zip(here, away, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            same(one, other)
    assert queue.waits == 1


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_shards(queue, batches, affine):
    axis, (batch, grad) = batches
    state = layer(torch.float64, channel_axis=axis, affine=affine)
    here, away = shard_moments(state, batch), shard_moments(state, *there(batch))
    same(here[0].mean, away[0].mean)
    same(here[0].var, away[0].var)
    same(here[1].low, away[1].low)
    same(here[1].high, away[1].high)
    assert (here[0].count, here[1].limit) == (away[0].count, away[1].limit)
    assert queue.waits == 1

    whole = here[0]
    same(
        normalize_with(state, output_parameters(state), batch, whole).output,
        normalize_with(state, output_parameters(state), *there(batch), whole).output,
    )
    assert queue.waits == 2

    sums, others = gradient_sums(state, batch, grad), gradient_sums(state, *there(batch, grad))
    same(sums.moments.mean, others.moments.mean)
    same(sums.moments.var, others.moments.var)
    same(sums.grad, others.grad)
    torch.testing.assert_close(others.grad_centered, sums.grad_centered, rtol=1e-9, atol=1e-9)
    assert queue.waits == 3

    total = merge_sums([sums, gradient_sums(state, grad, batch)], 3)
    mine, theirs = shard_backward(state, batch, grad, total), shard_backward(state, *there(batch, grad), total)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    assert queue.waits == 4


@pytest.mark.parametrize(
    ("config", "value", "weight"),
    [({}, float("nan"), 1.0), ({}, 1.0, 1e38), ({"clip": 1.0}, 1.0, 1e38)],
    ids=["NaN", "overflow", "overflow that clip would hide"],
)
def test_what_is_refused_here_is_refused_there(queue, config, value, weight):
    state = layer(**config)
    state = state._replace(weight=torch.full((3,), weight))
    batch = torch.zeros(1000, 3)
    batch[3, 1] = value
    with pytest.raises(NonFinite) as here:
        train_step(state, batch)
    with pytest.raises(NonFinite) as away:
        train_step(state, *there(batch))
    assert str(away.value) == str(here.value)
    assert queue.waits == 1


def test_too_few_values_are_refused_before_anything_is_queued(queue):
    with pytest.raises(TooFewValues):
        train_step(layer(), *there(torch.ones(1, 3)))
    assert not queue.sizes
