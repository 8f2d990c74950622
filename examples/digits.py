"""Normalizes the digits images with a real server, restarts it half-way, and compares with torch.

Run it with `make demo`. It fails if the service's statistics differ from torch's by more than rounding.
"""

from __future__ import annotations

import tempfile

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from server import server
from sklearn.datasets import load_digits

from batchnorm_client.wire.headers import IDEMPOTENCY_KEY
from batchnorm_client.wire.media_types import NPY

BATCH_SIZE = 64
LAYER = "/v1/layers/digits"
console = Console()


def normalize(client: httpx.Client, mode: str, batch: np.ndarray, key: str | None = None) -> np.ndarray:
    """One call, with .npy bodies in both directions."""
    headers = {"Content-Type": NPY} | ({IDEMPOTENCY_KEY: key} if key else {})
    answer = client.post(f"{LAYER}/{mode}", content=_npy(batch), headers=headers).raise_for_status()
    with tempfile.TemporaryFile() as file:
        file.write(answer.content)
        file.seek(0)
        return np.load(file)


def _npy(array: np.ndarray) -> bytes:
    with tempfile.TemporaryFile() as file:
        np.save(file, array)
        file.seek(0)
        return file.read()


def main() -> None:
    """Train batch by batch with a restart in between, evaluate, inspect, compare."""
    torch.set_num_threads(1)  # as the service does: the order of additions, and so their rounding, depends on it
    images = load_digits().images.astype(np.float32).reshape(-1, 1, 8, 8)
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    half = len(batches) // 2
    module = torch.nn.BatchNorm2d(1)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for part, first in ((batches[:half], 0), (batches[half:], half)):
            with server(f"sqlite:///{folder}/digits.db") as address, httpx.Client(base_url=address) as client:
                client.put(LAYER, json={"num_features": 1, "dimensions": 2}).raise_for_status()
                for index, batch in enumerate(track(part, f"train, batches {first + 1} to {first + len(part)}"), first):
                    output = normalize(client, "train", batch, key=f"batch-{index}")
                    expected = module(torch.from_numpy(batch)).detach().numpy()
                    worst = max(worst, float(np.abs(output - expected).max()))
                if first:
                    evaluated = normalize(client, "eval", images)
                    layer = client.get(LAYER).raise_for_status().json()
            console.print("server stopped and started again" if not first else "server stopped")
    expected = module.eval()(torch.from_numpy(images)).detach().numpy()
    report(layer, module, worst, float(np.abs(evaluated - expected).max()))


def report(layer: dict, module: torch.nn.BatchNorm2d, train_gap: float, eval_gap: float) -> None:
    """Print the service's and torch's statistics; exit with status 1 if they differ."""
    rows = {
        "num_batches_tracked": (layer["num_batches_tracked"], int(module.num_batches_tracked)),
        "running_mean": (np.float32(layer["running_mean"][0]), module.running_mean.numpy()[0]),
        "running_var": (np.float32(layer["running_var"][0]), module.running_var.numpy()[0]),
    }
    table = Table("", "service", "torch", "difference")
    for name, (ours, theirs) in rows.items():
        table.add_row(name, f"{ours:.9g}", f"{theirs:.9g}", f"{abs(ours - theirs):.2g}")
    table.add_row("largest train output", "", "", f"{train_gap:.2g}")
    table.add_row("largest eval output", "", "", f"{eval_gap:.2g}")
    console.print(table)
    close = all(np.isclose(ours, theirs, rtol=1e-5) for ours, theirs in rows.values())
    if not (close and train_gap == 0 and eval_gap < 1e-5):
        raise SystemExit("the service and torch differ")
    console.print("The service and torch agree.")


if __name__ == "__main__":
    main()
