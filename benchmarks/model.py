"""`python -m benchmarks.model`: a model with 53 batch normalizations, with torch's modules, local and remote ones.

53 times convolution, batch normalization and ReLU, 32 channels, 8 x 8, batches of 8, one thread; the service over
SQLite on its own core. The median of passes, in which the models take turns: a forward pass in eval mode and in train
mode, without gradients, and a training step with a backward pass and an optimizer that changes all parameters.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from batchnorm_client import Client
from batchnorm_client.torch import convert_batchnorm
from benchmarks import cores
from benchmarks.process import service

_LAYERS, _CHANNELS = 53, 32


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--passes", type=int, default=30, help="of each kind (30)")
    passes = parser.parse_args().passes
    cores.use_load_core()
    torch.set_num_threads(1)
    batch = torch.randn(8, _CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        server = service(f"sqlite:///{Path(directory) / 'layers.db'}")
        try:
            with Client(f"http://127.0.0.1:{server.port}") as client:
                models = {
                    "plain torch": _model(),
                    'compute="local"': convert_batchnorm(_model(), client, "local.", compute="local"),
                    'compute="remote"': convert_batchnorm(_model(), client, "remote."),
                }
                _measure(models, batch, passes)
        finally:
            server.stop()


def _measure(models: dict[str, nn.Sequential], batch: torch.Tensor, passes: int) -> None:
    kinds: dict[str, dict[str, Callable[[], object]]] = {"eval": {}, "train": {}, "step": {}}
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        kinds["eval"][name] = lambda model=model: _forward(model.eval(), batch)
        kinds["train"][name] = lambda model=model: _forward(model.train(), batch)
        kinds["step"][name] = lambda model=model, optimizer=optimizer: _step(model.train(), optimizer, batch)
    print("| ms | eval | train | train, backward and optimizer |\n|---|---|---|---|")
    times: dict[str, list[float]] = {name: [] for name in models}
    for calls in kinds.values():  # one kind after the other: an eval pass after a training step has all states to read
        taken = [{name: _milliseconds(call) for name, call in calls.items()} for _ in range(passes + 1)]
        for name in models:
            times[name].append(median(each[name] for each in taken[1:]))
    for name, each in times.items():
        print(f"| {name} | {' | '.join(f'{milliseconds:.1f}' for milliseconds in each)} |")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(_LAYERS):
        layers += [nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(_CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers)


def _forward(model: nn.Module, batch: torch.Tensor) -> None:
    with torch.no_grad():
        model(batch)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


if __name__ == "__main__":
    main()
