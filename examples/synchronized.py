"""Four processes train one model on digits with synchronized batches, as one process with the whole batch would.

    python examples/synchronized.py --plot docs/synchronized.png

Each process has a shard of every batch; the shards differ in size. Batch normalization is a layer of the service
with `group_size=4`: every shard is normalized with the statistics of all four, and the backward pass exchanges the
sums of the gradients, as `nn.SyncBatchNorm` does. The gradients of the parameters are summed by gloo's all_reduce.

torch cannot do this on CPUs: `nn.SyncBatchNorm` needs GPUs. In a gloo process group on a CPU torch 2.13 raises
"ValueError: SyncBatchNorm expected input tensor to be on GPU or XPU or privateuseone"; the script shows it. For
comparison it also trains with `nn.BatchNorm` in each process, whose losses differ.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import uuid
from pathlib import Path

import numpy as np
import torch
from server import server
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from batchnorm_client import Client
from batchnorm_client.torch import convert_batchnorm

SHARDS = (16, 8, 20, 4)
BATCH_SIZE = sum(SHARDS)
PROMISED = 1e-4


def net() -> nn.Sequential:
    """Two hidden layers, both normalized."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same for every process: images (N, 64) in 0..1 and labels."""
    found = load_digits()
    rng = np.random.default_rng(0)
    chosen = [rng.choice(len(found.target), BATCH_SIZE, replace=False) for _ in range(steps)]
    return [(torch.tensor(found.data[i] / 16, dtype=torch.float32), torch.tensor(found.target[i])) for i in chosen]


def whole(steps: int) -> list[float]:
    """Losses of one process that has the whole batches."""
    model, losses = net(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for images, labels in batches(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def shard(rank: int, model: nn.Module, steps: int) -> list[float]:
    """Losses of the whole batches, of which this process has a part: summed, and divided by the whole's size."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
    for images, labels in batches(steps):
        mine, mine_labels = images.split(SHARDS)[rank], labels.split(SHARDS)[rank]
        optimizer.zero_grad()
        loss = cross_entropy(model(mine), mine_labels, reduction="sum") / BATCH_SIZE
        loss.backward()
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
        optimizer.step()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def torchs_own() -> str:
    """The error of `nn.SyncBatchNorm` for a CPU tensor."""
    try:
        nn.SyncBatchNorm(2)(torch.zeros(4, 2))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing: it works"


def work(rank: int, url: str, run: str, meeting: str, steps: int, results) -> None:
    """One process: train with the service, then with torch's own layers."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(SHARDS))
    with Client(url) as client:
        # Adopt: another process may have come first.
        model = convert_batchnorm(net(), client, prefix="digits.", existing="adopt", group=run, group_size=len(SHARDS))
        together = shard(rank, model, steps)
    apart = shard(rank, net(), steps)
    if rank == 0:
        results.put((together, apart, torchs_own()))
    distributed.destroy_process_group()


def train(url: str, steps: int) -> tuple[list[float], list[float], str]:
    """Losses with synchronized and with private batch normalization, and the error of torch's `nn.SyncBatchNorm`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (url, f"run-{uuid.uuid4().hex}", f"{folder}/meeting", steps, results)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(len(SHARDS))]
        for process in processes:
            process.start()
        found = results.get(timeout=100)
        for process in processes:
            process.join()
    return found


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Draw all losses, and their distance from those of one process."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - imported only for a picture

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = (("#f2a65a", 5), ("#1b3a5c", 1.4), ("#c8553d", 1.2))
    reference = np.array(next(iter(losses.values())))
    for (name, values), (color, width) in zip(losses.items(), styles, strict=True):
        steps = range(1, len(values) + 1)
        left.plot(steps, values, color=color, linewidth=width, label=name)
        if values is not next(iter(losses.values())):
            gap = np.maximum(np.abs(np.array(values) - reference), 1e-9)
            right.plot(steps, gap, color=color, linewidth=1.4, label=name)
    right.axhline(PROMISED, color="#888888", linewidth=1, linestyle="--", label=f"promised: {PROMISED:g}")
    right.set_yscale("log")
    left.set_ylabel("training loss, cross entropy")
    right.set_ylabel("difference (0 is drawn as 1e-9)")
    left.set_title(f"shards of {', '.join(map(str, SHARDS))}", fontsize=11)
    right.set_title("how far the losses are from one process's", fontsize=11)
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.34))
    figure.savefig(path, dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


def main() -> int:
    """Train, compare, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="of training (default 50)")
    parser.add_argument("--plot", type=Path, help="where to save the picture, a PNG file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one = whole(arguments.steps)
    with server() as url:
        together, apart, said = train(url, arguments.steps)
    gap, private = (max(abs(a - b) for a, b in zip(one, other, strict=True)) for other in (together, apart))
    print(f"{len(SHARDS)} processes, shards of {SHARDS}, {arguments.steps} steps; loss {one[0]:.4f} to {one[-1]:.4f}")
    print(f"largest difference from one process with the whole batch: {gap:.1e} synchronized by the service")
    print(f"                                                          {private:.1e} with private nn.BatchNorm1d")
    print(f"torch's nn.SyncBatchNorm with gloo on a CPU: {said}")
    if arguments.plot:
        names = ("one process, whole batch", "four processes, through the service", "four processes, private")
        plot(dict(zip(names, (one, together, apart), strict=True)), arguments.plot)
        print(f"the picture is in {arguments.plot}")
    kept = gap <= PROMISED
    print(f"The losses are{'' if kept else ' NOT'} equal within {PROMISED:g}.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
