"""`python -m benchmarks.gpu`: the engine on a CUDA device, against torch's own module and against copying.

Two tables. The first has the kernels of a step, everything being on the device already: times are those of the device
(CUDA events), which is kept busy until all is queued, so that what the CPU does in between does not count. The second
has a call as the service makes it, from ordinary memory and back: times are those of a clock. What is larger than the
staging buffer goes through it in pieces there. `make bench-gpu` runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter

import torch
from torch import Tensor, nn

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_service.engine import normalize
from batchnorm_service.engine.staging import staged
from batchnorm_service.engine.state import LayerState, initial_state

_MIB = 1 << 20
_SIZES = (8 * _MIB, 64 * _MIB, 256 * _MIB, 1024 * _MIB)
_CHANNELS, _SIDE = 64, 32
_ROUNDS = 15
_TARGET = 1.1
_BUSY = 20_000_000  # clock cycles: about ten milliseconds, many times what queueing a step takes


def main() -> None:
    """Print the tables, or that there is nothing to measure."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was measured.")
        return
    torch.set_num_threads(1)  # as the service
    device = torch.device("cuda", 0)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print("Kernels:\n")
    print("| batch | step | engine, ms | nn.BatchNorm2d, ms | ratio (min to max) | target | copy, ms | engine, GB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for size in _SIZES:
        batch = _batch(size).to(device)
        for training in (True, False):
            print(_kernels(batch, training=training), flush=True)
        del batch
    print("\nFrom ordinary memory to ordinary memory. Plain: nn.BatchNorm2d, `.to(device)` before and `.cpu()` after.")
    print("Copies: as many bytes to the device and back, from and to pinned memory.\n")
    print("| batch | step | staged, ms | plain, ms | copies, ms | staged / copies (min to max) | staged, GB/s |")
    print("|---|---|---|---|---|---|---|")
    for size in _SIZES:
        batch = _batch(size)
        for training in (True, False):
            print(_whole_way(batch, device, training=training), flush=True)


def _batch(nbytes: int) -> Tensor:
    return torch.randn(nbytes // (4 * _CHANNELS * _SIDE**2), _CHANNELS, _SIDE, _SIDE)


def _state() -> LayerState:
    return initial_state(LayerConfig(num_features=_CHANNELS, device="cuda"))


def _kernels(batch: Tensor, *, training: bool) -> str:
    """One row of the first table. The layer's vectors are on the device too, as the module's are."""
    there = {name: vector.to(batch.device) for name, vector in _state().vectors().items()}
    state = _state()._replace(**there)
    count = batch.numel() // _CHANNELS
    module = nn.BatchNorm2d(_CHANNELS, device=batch.device).train(training)
    target = torch.empty_like(batch)

    # The private halves of `train_step` and `eval_step`: the other half of both waits for the device.
    def ours() -> object:
        if training:
            return normalize._kernel(state, batch, count)
        return normalize._with_statistics(state, batch, there["running_mean"], there["running_var"])

    with torch.inference_mode():
        rounds = _rounds(_device_milliseconds, ours, lambda: module(batch), lambda: target.copy_(batch))
    engine, torchs, copy = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratios = sorted(mine / theirs for mine, theirs, _ in rounds)
    ratio = statistics.median(ratios)
    verdict = "met" if ratio <= _TARGET else "**not met**"
    # A copy reads and writes the batch once; so does eval, and train reads it twice.
    moved = (3 if training else 2) * batch.nbytes / (engine / 1e3) / 1e9
    return (
        f"| {batch.nbytes // _MIB} MiB | {_name(training)} | {engine:.3f} | {torchs:.3f} "
        f"| {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | ≤ {_TARGET} {verdict} | {copy:.3f} | {moved:,.0f} |"
    )


def _whole_way(batch: Tensor, device: torch.device, *, training: bool) -> str:
    """One row of the second table."""
    state = _state()
    step = normalize.train_step if training else normalize.eval_step
    module = nn.BatchNorm2d(_CHANNELS, device=device).train(training)
    pinned = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
    there = torch.empty(batch.shape, dtype=batch.dtype, device=device)

    def ours() -> object:
        return staged(device, step, state, batch)

    def plain() -> object:
        return module(batch.to(device)).cpu()

    def copies() -> None:
        there.copy_(pinned, non_blocking=True)
        pinned.copy_(there, non_blocking=True)

    with torch.inference_mode():
        rounds = _rounds(_milliseconds, ours, plain, copies)
    engine, torchs, copy = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratios = sorted(mine / theirs for mine, _, theirs in rounds)
    moved = 2 * batch.nbytes / (engine / 1e3) / 1e9
    return (
        f"| {batch.nbytes // _MIB} MiB | {_name(training)} | {engine:.3f} | {torchs:.3f} | {copy:.3f} "
        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {moved:,.1f} |"
    )


def _name(training: bool) -> str:
    return "train" if training else "eval"


def _rounds(time: Callable[[Callable[[], object]], float], *functions: Callable[[], object]) -> list[list[float]]:
    """The functions' times, in turns. The first call of each is left out: it loads kernels and makes buffers."""
    for function in functions:
        time(function)
    return [[time(function) for function in functions] for _ in range(_ROUNDS)]


def _device_milliseconds(function: Callable[[], object]) -> float:
    """How long the device is busy with it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_BUSY)
    begin.record()
    result = function()
    end.record()
    torch.cuda.synchronize()
    del result
    return begin.elapsed_time(end)


def _milliseconds(function: Callable[[], object]) -> float:
    """How long it takes until its result is there."""
    torch.cuda.synchronize()
    begin = perf_counter()
    result = function()
    torch.cuda.synchronize()
    taken = 1e3 * (perf_counter() - begin)
    del result
    return taken


if __name__ == "__main__":
    main()
