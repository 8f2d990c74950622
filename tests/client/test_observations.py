"""Observations as reinforcement learning has them: folded, then normalized; one at a time; in float64. And frames."""

import numpy as np
import pytest
import torch

from batchnorm_client import DtypeMismatch, IdempotencyKeyReused, InvalidRequest, ShapeMismatch, TooFewValues

BATCH = np.random.default_rng(0).normal(3, 2, (6, 3)).astype(np.float32)
KINDS = [np.asarray, torch.from_numpy]


@pytest.fixture
def population(client, name):
    return client.create_layer(name, 3, statistics="population", momentum=None, affine=False)


def _normalized(batch, seen):
    seen = seen.astype(np.float64)
    return (batch - seen.mean(0)) / np.sqrt(seen.var(0, ddof=1) + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_observed_batch_is_normalized_with_the_statistics_after_it(population, kind):
    first = population.train(kind(BATCH[:4]), normalize="running", statistics=True)
    second = population.train(kind(BATCH[4:]), normalize="running", key="k")
    assert isinstance(second.output, type(kind(BATCH)))
    np.testing.assert_allclose(first.output, _normalized(BATCH[:4], BATCH[:4]), rtol=1e-5)
    np.testing.assert_allclose(second.output, _normalized(BATCH[4:], BATCH), rtol=1e-5)
    np.testing.assert_allclose(first.statistics.mean, BATCH[:4].mean(0), rtol=1e-6)
    again = population.train(kind(BATCH[4:]), normalize="running", key="k")
    assert (again.replayed, again.num_batches_tracked) == (True, second.num_batches_tracked) == (True, 2)
    with pytest.raises(IdempotencyKeyReused):
        population.train(kind(BATCH[4:]), key="k")


def test_what_cannot_be_observed_is_refused(client, name, population):
    with pytest.raises(InvalidRequest, match="normalize"):
        population.train(BATCH, normalize="running", group="g", size=1)
    with pytest.raises(InvalidRequest, match="tracks none"):
        client.create_layer(f"{name}-off", 3, track_running_stats=False).train(BATCH, normalize="running")
    with pytest.raises(InvalidRequest, match="normalize"):
        population.train(BATCH, normalize="latest")
    assert population.inspect().num_batches_tracked == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_is_a_batch_of_one(population, kind):
    for number, one in enumerate(map(kind, BATCH), 1):
        result = population.train(one, normalize="running")
        assert result.output.shape == (3,)
        assert result.num_batches_tracked == number
    expected = _normalized(BATCH[-1], BATCH)
    np.testing.assert_allclose(result.output, expected, rtol=1e-5)
    last = kind(BATCH[-1])
    for output in (population.eval(last).output, population.eval_local(last).output):
        assert output.shape == (3,)
        np.testing.assert_allclose(output, expected, rtol=1e-5)
    np.testing.assert_allclose(population.inverse(result.output).output, BATCH[-1], rtol=1e-5)
    assert population.train_local(last).output.shape == (3,)
    assert population.backward(last, last, mode="eval").grad_input.shape == (3,)


def test_one_sample_is_too_few_for_torchs_rule(layer):
    with pytest.raises(TooFewValues):
        layer.train(BATCH[0])
    with pytest.raises(ShapeMismatch, match="3 channels"):
        layer.train(np.zeros(4, np.float32), normalize="running")


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_sent_to_a_float32_layer_only_where_the_handle_says_so(client, population, kind):
    wide = kind(BATCH.astype(np.float64))
    for refused in (population.train, population.eval, population.eval_local, population.train_local):
        with pytest.raises(DtypeMismatch, match="float64"):
            refused(wide)
    casting = client.layer(population.name, cast="float32")
    result = casting.train(wide, normalize="running")
    assert str(result.output.dtype).endswith("float32")
    np.testing.assert_allclose(result.output, _normalized(BATCH, BATCH), rtol=1e-5)
    for call in (casting.eval, casting.eval_local, casting.inverse, casting.train, casting.train_local):
        assert str(call(wide).output.dtype).endswith("float32")
    assert casting.backward(wide, wide, mode="eval").grad_input.shape == (6, 3)
    assert casting.train(wide[0], normalize="running").output.shape == (3,)
    with pytest.raises(ValueError, match="cast='int8'"):
        client.layer(population.name, cast="int8")


def _frame(rows):
    random = np.random.default_rng(1)
    return random.integers(2, 9, rows), random.normal(3, 2, (rows, 3)), random.random((rows, 3))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, np.ndarray.tolist])
def test_a_stack_of_moments_is_folded_in_one_call(client, layer, name, kind):
    frame = _frame(30)
    other = client.create_layer(f"{name}-other", 3)
    for count, mean, var in zip(*frame, strict=True):
        last = other.fold_moments(int(count), mean, var)
    result = layer.fold_moments(*map(kind, frame), key="k")
    assert (result.folded, result.num_batches_tracked, last.folded) == (30, 30, 1)
    for one, expected in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        np.testing.assert_array_equal(one, expected)
    again = layer.fold_moments(*frame, key="k")
    assert (again.replayed, again.folded, again.num_batches_tracked) == (True, 30, 30)


def test_a_bad_row_is_named(layer):
    count, mean, var = _frame(30)
    count[7] = 1
    with pytest.raises(TooFewValues, match="row 7") as raised:
        layer.fold_moments(count, mean, var)
    assert raised.value.fields["row"] == 7
    assert layer.inspect().num_batches_tracked == 0
    with pytest.raises(TypeError, match="integers"):
        layer.fold_moments(count.astype(float), mean, var)
    with pytest.raises(TypeError, match="integers"):
        layer.fold_moments(np.full(30, 2**63, np.uint64), mean, var)


def test_stacks_of_many_layers(client, layer, name):
    count, mean, var = _frame(5)
    bad = var.copy()
    bad[3] = -1
    client.create_layer(f"{name}-bad", 3)
    results = client.fold_moments(
        {name: (count, mean, var), f"{name}-bad": (count, mean, bad)} | {f"{name}-none": (4, mean[0], var[0])}
    )
    assert results[name].folded == 5
    assert results[f"{name}-bad"].fields["row"] == 3
    assert results[f"{name}-none"].name == "layer-not-found"
