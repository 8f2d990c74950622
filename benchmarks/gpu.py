"""`python -m benchmarks.gpu`: the engine on a CUDA device, against torch's own module and against copying.

Times are those of the device (CUDA events), without what the CPU does in between: that is hidden behind it as long as
a kernel takes longer than the calls that launch it. `make bench-gpu` runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from batchnorm_client.contract import LayerConfig
from batchnorm_service.engine.normalize import eval_step, train_step
from batchnorm_service.engine.state import initial_state

_MIB = 1 << 20
_SIZES = (8 * _MIB, 64 * _MIB, 256 * _MIB, 1024 * _MIB)
_CHANNELS, _SIDE = 64, 32
_ROUNDS = 15
_TARGET = 1.1


def main() -> None:
    """Print the table, or that there is nothing to measure."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was measured.")
        return
    device = torch.device("cuda")
    print(f"{datetime.now(UTC):%Y-%m-%d}, {torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print("| batch | step | engine, ms | nn.BatchNorm2d, ms | ratio (min to max) | target | copy, ms | engine, GB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for size in _SIZES:
        batch = torch.randn(size // (4 * _CHANNELS * _SIDE**2), _CHANNELS, _SIDE, _SIDE, device=device)
        for training in (True, False):
            print(_row(batch, training=training), flush=True)


def _row(batch: Tensor, *, training: bool) -> str:
    state = initial_state(LayerConfig(num_features=_CHANNELS, device="cuda", non_finite="allow"))
    module = nn.BatchNorm2d(_CHANNELS, device=batch.device).train(training)
    target = torch.empty_like(batch)

    def ours() -> object:
        return train_step(state, batch) if training else eval_step(state, batch)

    with torch.inference_mode():
        functions = (ours, lambda: module(batch), lambda: target.copy_(batch))
        for function in functions:  # the first call of a kernel loads it
            _milliseconds(function)
        rounds = [[_milliseconds(function) for function in functions] for _ in range(_ROUNDS)]
    engine, torchs, copy = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratios = sorted(mine / theirs for mine, theirs, _ in rounds)
    ratio = statistics.median(ratios)
    verdict = "met" if ratio <= _TARGET else "**not met**"
    # A copy reads and writes the batch once; so does eval, and train reads it twice.
    moved = (3 if training else 2) * batch.nbytes / (engine / 1e3) / 1e9
    return (
        f"| {batch.nbytes // _MIB} MiB | {'train' if training else 'eval'} | {engine:.3f} | {torchs:.3f} "
        f"| {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | ≤ {_TARGET} {verdict} | {copy:.3f} | {moved:,.0f} |"
    )


def _milliseconds(function: Callable[[], object]) -> float:
    """How long the device is busy with it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    result = function()
    end.record()
    torch.cuda.synchronize()
    del result
    return begin.elapsed_time(end)


if __name__ == "__main__":
    main()
