"""How close a layer must be to its model: invariants 1 and 6 of the design."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from machines.model import Model, View

CLOSE = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5, torch.float64: 1e-11}


def check(model: Model, view: View) -> None:
    """The whole state of a layer, as GET shows it. Folds of moments that a caller rounded are taken over."""
    assert view.config == model.config
    assert (view.version, view.batches, view.samples) == (model.version, model.batches, model.samples)
    assert view.created == model.created
    theirs = model.module.state_dict()
    assert view.tensors.keys() - {"samples_tracked", "population_mean", "population_m2"} == theirs.keys()
    for name in theirs.keys() & {"weight", "bias", "num_batches_tracked"}:
        assert torch.equal(view.tensors[name], theirs[name]), name
    if model.module.running_mean is None:
        return
    if model.population:
        check_population(model, view.tensors)
        return
    mean, var = view.tensors["running_mean"], view.tensors["running_var"]
    if model.inexact:
        assert_close(mean, theirs["running_mean"])
        assert_close(var, theirs["running_var"])
        model.module.running_mean.copy_(mean)
        model.module.running_var.copy_(var)
        model.slack, model.inexact = 0.0, False
    assert_equal(mean, theirs["running_mean"])
    assert_equal(var.isfinite(), theirs["running_var"].isfinite())
    distance = (var.double() - theirs["running_var"].double()).abs().nan_to_num(0, 0).numpy()
    assert (distance <= model.slack).all(), f"{var} is not {theirs['running_var']}"


def check_population(model: Model, tensors: dict[str, Tensor]) -> None:
    """numpy's mean and unbiased variance of all samples, (C, n)."""
    samples = np.concatenate([np.empty((model.channels, 0)), *model.values], axis=1)
    count, finite = samples.shape[1], np.isfinite(samples).all(1)
    assert int(tensors["samples_tracked"]) == count == model.samples
    mean, m2 = tensors["population_mean"].numpy(), tensors["population_m2"].numpy()
    assert (np.isfinite(m2) == finite).all()
    samples = samples[finite]
    largest = np.abs(samples).max(1, initial=0)
    assert (np.abs(mean[finite] - (samples.mean(1) if count else 0)) <= 1e-13 * largest).all()
    if count > 1:
        var = samples.var(1, ddof=1)
        assert (np.abs(m2[finite] / (count - 1) - var) <= 1e-10 * var + (1e-12 * largest) ** 2).all()
    unbiased = m2 / (count - 1) if count > 1 else np.ones_like(m2)
    assert_equal(tensors["running_mean"], torch.from_numpy(mean).to(model.dtype))
    assert_equal(tensors["running_var"], torch.from_numpy(unbiased).to(model.dtype))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Bit by bit, but for the bits of NaN."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert ((found == expected) | (found.isnan() & expected.isnan())).all(), f"{found} is not {expected}"


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Up to rounding of the dtype."""
    tolerance = CLOSE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
