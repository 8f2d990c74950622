"""Federated digits: five clients that keep their images private find the statistics of all images, in one pass.

    python examples/federated.py --plot docs/federated.png

The digits are sorted by label, so that each client has mostly two of them. Each sends count, mean and variance per
pixel (`fold_moments`) and keeps its images. The service's variance equals the centralized one up to rounding;
averaging the clients' variances, as FedAvg averages buffers, loses the differences between the clients.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from server import server
from sklearn.datasets import load_digits

from batchnorm_client import Client

CLIENTS = 5
BATCH_SIZE = 64
PROMISED = 1e-12


def shards(limit: int) -> list[np.ndarray]:
    """The clients' images, (N, 64) in float64, sorted by label."""
    found = load_digits()
    images, labels = found.data[:limit], found.target[:limit]
    return np.array_split(images[np.argsort(labels, kind="stable")], CLIENTS)


def federated(parts: list[np.ndarray], url: str) -> np.ndarray:
    """The unbiased variance that the service has after every client's pass over its own images."""
    pixels = parts[0].shape[1]
    with Client(url) as client:
        layer = client.create_layer("digits", pixels, statistics="population", dtype="float64", affine=False)
        for images in parts:
            for start in range(0, len(images), BATCH_SIZE):
                batch = images[start : start + BATCH_SIZE]
                layer.fold_moments(len(batch), batch.mean(0), batch.var(0))
        return layer.state_dict()["running_var"]


def error(var: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The relative error per pixel, without pixels that are constant."""
    varies = truth > 0
    return np.abs(var[varies] - truth[varies]) / truth[varies]


def plot(exact: np.ndarray, averaged: np.ndarray, path: Path) -> None:
    """Draw both errors of every pixel on a logarithmic axis, which starts at the resolution of float64."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - imported only for a picture

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    order, floor = np.argsort(averaged), np.finfo(float).eps
    ranks, folded = np.arange(1, len(order) + 1), np.maximum(exact[order], floor)
    axis.plot(ranks, averaged[order], "o", color="#f2a65a", markersize=5, label="the clients' variances, averaged")
    axis.plot(ranks, folded, "o", color="#1b3a5c", markersize=4, label="moments, folded by the service")
    axis.axhline(PROMISED, color="#888888", linewidth=1, linestyle="--", label=f"promised: {PROMISED:g}")
    axis.set_yscale("log")
    axis.set_xlabel(f"rank of the pixel among the {len(order)} that vary (1: averaging errs least there)")
    axis.set_ylabel("relative error of the variance")
    axis.set_title(f"{CLIENTS} clients that hold digits sorted by label", fontsize=11)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


def main() -> int:
    """Fold, compare, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=1797, help="how many digits (default: all 1797)")
    parser.add_argument("--plot", type=Path, help="where to save the picture, a PNG file")
    arguments = parser.parse_args()
    parts = shards(arguments.images)
    truth = np.concatenate(parts).var(0, ddof=1)
    with server() as url:
        exact = error(federated(parts, url), truth)
    averaged = error(np.mean([part.var(0, ddof=1) for part in parts], axis=0), truth)
    print(f"{CLIENTS} clients, {sum(map(len, parts))} images, {len(truth)} pixels, {len(exact)} of them not constant")
    print("relative error of the variance            median    largest")
    print(f"  moments, folded by the service         {np.median(exact):8.1e}   {exact.max():8.1e}")
    print(f"  the clients' variances, averaged       {np.median(averaged):8.1%}   {averaged.max():8.1%}")
    if arguments.plot:
        plot(exact, averaged, arguments.plot)
        print(f"the picture is in {arguments.plot}")
    kept = bool(exact.max() <= PROMISED)
    print(f"The service's variance is the centralized one{'' if kept else ' NOT'} within {PROMISED:g}.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
