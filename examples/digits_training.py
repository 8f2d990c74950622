"""Trains two nets on digits with batch normalization in the service, and the same nets with torch's own modules.

    python examples/digits_training.py --plot docs/digits_training.png

Both start from the same seed and see the same batches. The service runs on this machine, and with one intra-op thread
on both sides they compute the same numbers. The script prints how far losses, parameters and running statistics differ,
and exits with status 1 if it is more than rounding in the running variance.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from server import server
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm_client import Client
from batchnorm_client.torch import convert_batchnorm, revert

HELD_OUT = 360
BATCH_SIZE = 60  # as in the experiment of the paper
LIMIT_ULP = 3
"""The largest allowed difference of running_var, in units in the last place."""


def convolutional() -> nn.Sequential:
    """A small net with BatchNorm2d."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def sigmoid() -> nn.Sequential:
    """Three layers of 100 sigmoid units with BatchNorm1d: section 4.1 of https://arxiv.org/abs/1502.03167."""
    hidden = [
        layer
        for inputs in (64, 100, 100)
        for layer in (nn.Linear(inputs, 100, bias=False), nn.BatchNorm1d(100), nn.Sigmoid())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))


NETS = {
    "convolutional": (convolutional, lambda parameters: torch.optim.Adam(parameters, 0.003)),
    "3x100 sigmoid": (sigmoid, lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)),
}


@dataclass
class Digits:
    """The images, (N, 1, 8, 8) in 0..1, and their labels, in two parts."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out: torch.Tensor
    held_out_labels: torch.Tensor


@dataclass
class Run:
    """The result of a training run.

    Attributes:
        losses: one per step.
        state: the model's, at the end.
        parameters: names of those entries that are parameters.
        accuracy: on the held-out digits, in eval mode.
        seconds: per step, the median.
    """

    losses: list[float]
    state: dict[str, torch.Tensor]
    parameters: set[str]
    accuracy: float
    seconds: float


def load() -> Digits:
    """The 1797 digits of scikit-learn, shuffled."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.tensor(found.images[order] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(found.target[order])
    return Digits(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT])


def train(name: str, digits: Digits, steps: int, client: Client | None) -> Run:
    """Train one of NETS; with a client, its batch normalizations are layers of the service."""
    make, make_optimizer = NETS[name]
    torch.manual_seed(1)
    model = make()
    optimizer = make_optimizer(model.parameters())
    if client:
        convert_batchnorm(model, client, prefix=f"{name.replace(' ', '-')}.")
    losses, seconds = [], []
    for _ in range(steps):
        chosen = torch.randint(len(digits.images), (BATCH_SIZE,))
        start = time.perf_counter()
        loss = cross_entropy(model(digits.images[chosen]), digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    right = accuracy(model, digits)
    revert(model)
    if accuracy(model, digits) != right:
        raise SystemExit(f"{name}: without the service the model predicts differently")
    parameters = {key for key, _ in model.named_parameters()}
    return Run(losses, model.state_dict(), parameters, right, float(np.median(seconds)))


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The fraction of the held-out digits that a model classifies correctly."""
    model.eval()
    with torch.no_grad():
        return float((model(digits.held_out).argmax(1) == digits.held_out_labels).double().mean())


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """The largest distance in units in the last place; float32, of one sign."""
    return int((ours.view(torch.int32).long() - theirs.view(torch.int32).long()).abs().max())


def equality(ours: Run, theirs: Run) -> tuple[dict[str, str], bool]:
    """In words, what is equal and how far the rest differs; and whether that is within the limits."""
    apart = [step for step, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True), 1) if a != b]
    gap = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    losses = f"from step {apart[0]} on, by up to {gap:.2g}" if apart else "bit-equal"
    distances = {key: float((ours.state[key] - theirs.state[key]).abs().max()) for key in ours.parameters}
    worst = max(distances, key=lambda key: distances[key])
    parameters = f"by up to {distances[worst]:.2g}, in {worst}" if distances[worst] else "bit-equal"
    means, variances = (
        max(ulps(ours.state[key], theirs.state[key]) for key in ours.state if key.endswith(end))
        for end in ("running_mean", "running_var")
    )
    counted = all(torch.equal(ours.state[key], theirs.state[key]) for key in ours.state if key.endswith("_tracked"))
    rows = {
        "losses": losses,
        "parameters": parameters,
        "running_mean": f"{means} ulp",
        "running_var": f"{variances} ulp",
        "num_batches_tracked": "equal" if counted else "different",
    }
    good = not apart and not distances[worst] and means == 0 and variances <= LIMIT_ULP and counted
    return rows, good and ours.accuracy == theirs.accuracy


def plot(runs: dict[str, tuple[Run, Run]], path: Path) -> None:
    """Draw both loss curves of each net."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - imported only for a picture

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True)
    for axis, (name, (ours, theirs)) in zip(axes, runs.items(), strict=True):
        steps = range(1, len(ours.losses) + 1)
        axis.plot(steps, theirs.losses, color="#f2a65a", linewidth=5, label="nn.BatchNorm")
        axis.plot(steps, ours.losses, color="#1b3a5c", linewidth=1.2, label="RemoteBatchNorm")
        equal = ours.losses == theirs.losses
        axis.set_title(f"{name} net: {ours.accuracy:.1%} of held-out digits right", fontsize=11)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(title="the same to the last bit" if equal else "different", frameon=False)
    axes[0].set_ylabel("training loss, cross entropy")
    figure.savefig(path, dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


def main() -> int:
    """Train, compare, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of training, for each net (default 200)")
    parser.add_argument("--plot", type=Path, help="where to save the loss curves, a PNG file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the service does: the order of additions, and so their rounding, depends on it
    digits, runs, all_good = load(), {}, True
    table = Table("", *NETS)
    columns = []
    with server() as address, Client(address) as client:
        for name in NETS:
            ours, theirs = runs[name] = (
                train(name, digits, arguments.steps, client),
                train(name, digits, arguments.steps, None),
            )
            rows, good = equality(ours, theirs)
            all_good &= good
            columns.append(
                rows
                | {
                    "accuracy, held out": f"{ours.accuracy:.2%} and {theirs.accuracy:.2%}",
                    "ms per step": f"{ours.seconds * 1e3:.2f} and {theirs.seconds * 1e3:.2f}",
                    "loss, first and last": f"{ours.losses[0]:.3f} and {ours.losses[-1]:.3f}",
                }
            )
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    Console().print(f"RemoteBatchNorm and nn.BatchNorm after {arguments.steps} steps", table, sep="\n")
    if arguments.plot:
        plot(runs, arguments.plot)
        print(f"the curves are in {arguments.plot}")
    print("The service and torch agree." if all_good else "The service and torch differ.")
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
