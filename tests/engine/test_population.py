"""Population statistics: numpy over all samples, and scikit-learn, are the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, load_wine
from sklearn.preprocessing import StandardScaler

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_service.engine.moments import Moments, exact_moments, merge
from batchnorm_service.engine.normalize import train_step
from batchnorm_service.engine.running_statistics import fold
from batchnorm_service.engine.state import LayerState, initial_state, reset, update
from batchnorm_service.engine.state_dict import replace_tensors, state_dict
from batchnorm_service.engine.tensors import to_torch, to_wire

# What float64 leaves at an offset: the samples themselves are rounded to eps * offset.
TOLERANCES = [(0.0, 1e-12), (1e4, 1e-11), (1e8, 1e-7)]


def _layer(channels: int, **config: object) -> LayerState:
    return initial_state(LayerConfig(num_features=channels, statistics="population", dtype="float64", **config))


def _train(state: LayerState, batches: list[np.ndarray]) -> LayerState:
    for batch in batches:
        state = fold(state, train_step(state, torch.from_numpy(np.ascontiguousarray(batch))).moments)
    return state


def _split(samples: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return [piece for piece in np.split(samples, sorted({cut % len(samples) for cut in cuts})) if len(piece)]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.integers(1, 5), st.lists(st.integers(0, 10_000), max_size=30), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize(("offset", "tolerance"), TOLERANCES)
def test_any_grouping_gives_numpys_mean_and_unbiased_variance(
    offset: float, tolerance: float, count: int, channels: int, cuts: list[int], seed: int
) -> None:
    count += 50 if offset else 0  # two samples may be so close that float64 leaves little of their distance
    samples = np.random.default_rng(seed).normal(offset, 1.0 + seed % 9, size=(count, channels))
    state = _train(_layer(channels), _split(samples, cuts))
    # The oracle works on samples without the offset: numpy's own variance loses digits there too.
    var = (samples - offset).var(0, ddof=1)
    assert np.allclose(state.running_var.numpy(), var, rtol=tolerance, atol=0)
    assert np.allclose(state.running_mean.numpy(), samples.mean(0), rtol=1e-12, atol=1e-12 * (1 + seed % 9))
    assert state.samples_tracked == count


def test_single_samples_and_uneven_batches_in_any_order_agree() -> None:
    samples = np.random.default_rng(1).normal(3, 2, size=(300, 4))
    one_by_one = _train(_layer(4), [samples[i : i + 1] for i in range(300)])
    backwards = _train(_layer(4), [samples[200:], samples[1:200], samples[:1]])
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(one_by_one, name).numpy(), getattr(backwards, name).numpy()
        assert np.allclose(ours, theirs, rtol=1e-12, atol=0)
    assert one_by_one.num_batches_tracked == 300


def test_the_variance_stays_one_until_two_values_were_seen() -> None:
    state = _train(_layer(2), [np.array([[5.0, 7.0]])])
    assert state.running_mean.tolist() == [5.0, 7.0]
    assert state.running_var.tolist() == [1.0, 1.0]
    assert _train(state, [np.array([[7.0, 7.0]])]).running_var.tolist() == [2.0, 0.0]


def test_one_value_per_channel_is_normalized_to_the_bias_and_none_is_refused() -> None:
    state = update(_layer(2), LayerUpdate(bias=[0.5, -0.5]))
    assert train_step(state, torch.tensor([[3.0, 4.0]], dtype=torch.float64)).output.tolist() == [[0.5, -0.5]]
    with pytest.raises(errors.TooFewValues):
        train_step(state, torch.empty(0, 2, dtype=torch.float64))


@pytest.mark.parametrize("load", [load_digits, load_wine])
def test_real_data_batch_by_batch_equals_scikit_learns_scaler(load: object) -> None:
    data = load().data
    scaler, state = StandardScaler(), _layer(data.shape[1])
    for start in range(0, len(data), 37):
        batch = data[start : start + 37]
        scaler.partial_fit(batch)
        state = _train(state, [batch])
    biased = state.running_var.numpy() * (len(data) - 1) / len(data)
    assert np.allclose(state.running_mean.numpy(), scaler.mean_, rtol=1e-12, atol=1e-12)
    assert np.allclose(biased, scaler.var_, rtol=1e-12, atol=1e-12)


def test_label_sorted_digits_show_what_cumulative_averaging_misses() -> None:
    digits = load_digits()
    data = digits.data[np.argsort(digits.target, kind="stable")]
    batches = [data[start : start + 64] for start in range(0, len(data), 64)]
    seen = data.std(0) > 0
    true = data.var(0, ddof=1)[seen]
    cumulative = initial_state(LayerConfig(num_features=64, momentum=None, dtype="float64"))
    wrong = np.abs(_train(cumulative, batches).running_var.numpy()[seen] / true - 1)
    right = np.abs(_train(_layer(64), batches).running_var.numpy()[seen] / true - 1)
    assert np.median(wrong) > 0.05
    assert right.max() < 1e-12


def test_float32_batches_are_accumulated_in_float64() -> None:
    """E[x^2] - E[x]^2 in float32 gave a variance of -4 at an offset of 1e8."""
    samples = (np.arange(4096, dtype=np.float64).reshape(-1, 1) % 2 * 16 + 1e8).astype(np.float32)
    state = initial_state(LayerConfig(num_features=1, statistics="population"))
    state = _train(state, np.split(samples, 8))
    assert state.running_var.item() == pytest.approx(64 * 4096 / 4095, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_moments_are_those_of_the_whole_batch_whatever_its_size(dtype: torch.dtype) -> None:
    batch = (torch.randn(700, 3, 5, 40, generator=torch.Generator().manual_seed(3)) + 2).to(dtype)  # several chunks
    wide = batch.double().movedim(1, 0).reshape(3, -1)
    moments = exact_moments(batch)
    assert moments.count == 700 * 5 * 40
    assert torch.allclose(moments.mean, wide.mean(1), rtol=1e-13)
    assert torch.allclose(moments.biased_var(), wide.var(1, correction=0), rtol=1e-12)


def test_merging_moments_by_hand() -> None:
    # {1, 3} and {5}: mean 3, squared distances 4 + 0 + 4.
    def moments(count: int, mean: float, var: float) -> Moments:
        return Moments(count, torch.tensor([mean]), torch.tensor([var]), correction=0)

    whole = merge([moments(2, 2.0, 1.0), moments(0, 0.0, 0.0), moments(1, 5.0, 0.0)], 1)
    assert (whole.count, whole.mean.item(), whole.m2().item()) == (3, 3.0, 8.0)


def test_with_a_half_life_old_samples_weigh_less_by_samples_not_by_calls() -> None:
    """One by one, the k-th newest sample weighs 2^(-k/h): numpy's weighted mean is the oracle."""
    samples = np.random.default_rng(5).normal(2, 3, size=(200, 2))
    state = _train(_layer(2, half_life=50.0), [samples[i : i + 1] for i in range(200)])
    weights = 2.0 ** (-np.arange(199, -1, -1) / 50)
    mean = np.average(samples, axis=0, weights=weights)
    m2 = (weights[:, None] * (samples - mean) ** 2).sum(0)
    unbiased = m2 / (weights.sum() - (weights**2).sum() / weights.sum())
    assert np.allclose(state.running_mean.numpy(), mean, rtol=1e-12)
    assert np.allclose(state.running_var.numpy(), unbiased, rtol=1e-10)
    grouped = _train(_layer(2, half_life=50.0), np.split(samples, 20))
    assert grouped.accumulated.weight == pytest.approx(state.accumulated.weight, rel=1e-12)


GROUPINGS = [[1] * 40, [64] * 12, [1000] * 3, [1, 64, 1000, 2, 1, 1, 30], [3, 1]]
HALF_LIVES = [0.01, 0.5, 1.0, 2.0, 5.0, 100.0, None]


def _sample_weights(sizes: list[int], half_life: float | None) -> np.ndarray:
    """Each sample's weight: 2^(-newer/h) one by one, then shared in equal parts among those of one batch."""
    newer = np.arange(sum(sizes))[::-1]
    one_by_one = np.ones(sum(sizes)) if half_life is None else 2.0 ** (-newer / half_life)
    pieces = np.split(one_by_one, np.cumsum(sizes)[:-1])
    return np.concatenate([np.full(len(piece), piece.mean()) for piece in pieces])


def _freedom(weights: np.ndarray) -> float:
    """V1 - V2 / V1 as (V1^2 - V2) / V1, from sums without cancellation: twice the sum of all products of two."""
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    return 2 * (weights * before).sum() / weights.sum()


def _one_value_is_left(weights: np.ndarray) -> bool:
    return _freedom(weights) < 1e-9 * weights.sum()


@pytest.mark.parametrize("sizes", GROUPINGS, ids=str)
@pytest.mark.parametrize("half_life", HALF_LIVES)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_any_grouping_is_the_weighted_mean_and_variance_of_all_samples(
    sizes: list[int], half_life: float | None, offset: float
) -> None:
    samples = np.random.default_rng(11).normal(offset, 3, size=(sum(sizes), 5))
    state = _train(_layer(5, half_life=half_life), np.split(samples, np.cumsum(sizes)[:-1]))
    weights = _sample_weights(sizes, half_life)
    mean = np.average(samples - offset, axis=0, weights=weights)
    assert np.allclose(state.running_mean.numpy() - offset, mean, rtol=1e-9, atol=1e-9 + 1e-15 * offset)
    var = (weights[:, None] * (samples - offset - mean) ** 2).sum(0) / _freedom(weights)
    if _one_value_is_left(weights):
        var = np.ones(5)
    # Next to one value alone, what float64 rounds of 1 weighs as much as the rest does.
    rounding = 1e-15 * weights.sum() / max(_freedom(weights), 1e-300)
    assert np.allclose(state.running_var.numpy(), var, rtol=1e-9 + rounding + 1e-15 * offset, atol=0)


@pytest.mark.parametrize(
    ("size", "half_life"),
    [(size, half_life) for size in (1, 64, 1000) for half_life in HALF_LIVES if (size, half_life) != (1, 0.01)],
)
def test_the_expected_variance_is_the_true_one(size: int, half_life: float | None) -> None:
    """Each channel is a run. The variance is x'Ax, A = (diag(w) - ww' / V1) / freedom, which has expectation s^2 and,
    for normal samples, standard deviation s^2 sqrt(2 tr(A^2)). The mean over runs may be off by five of its deviations.
    (Single values with a half-life of 0.01 are left out: all but the last have faded, and the variance is 1.)
    """
    runs, true, sizes = 2000, 9.0, [size] * (20 if size == 1 else 3)
    weights = _sample_weights(sizes, half_life)
    samples = np.random.default_rng(12).normal(5, np.sqrt(true), size=(sum(sizes), runs))
    state = _train(_layer(runs, half_life=half_life), np.split(samples, len(sizes)))
    v1, v2, v3 = ((weights**power).sum() for power in (1, 2, 3))
    trace = (v2 - 2 * v3 / v1 + (v2 / v1) ** 2) / _freedom(weights) ** 2
    assert abs(state.running_var.numpy().mean() / true - 1) < 5 * np.sqrt(2 * trace / runs)


@pytest.mark.parametrize("sizes", GROUPINGS, ids=str)
@pytest.mark.parametrize("half_life", HALF_LIVES)
def test_moments_posted_alone_or_merged_weigh_like_the_batches_themselves(
    sizes: list[int], half_life: float | None
) -> None:
    """A group's shards are one batch: their samples are equally old."""
    samples = np.random.default_rng(13).normal(2, 3, size=(sum(sizes), 2))
    batches = np.split(samples, np.cumsum(sizes)[:-1])
    state = _layer(2, half_life=half_life)
    for batch in batches:
        shards = np.array_split(batch, 3)
        parts = [exact_moments(torch.from_numpy(np.ascontiguousarray(shard))) for shard in shards]
        state = fold(state, merge(parts, 2))
    whole = _train(_layer(2, half_life=half_life), batches)
    assert np.allclose(state.running_mean.numpy(), whole.running_mean.numpy(), rtol=1e-12)
    assert np.allclose(state.running_var.numpy(), whole.running_var.numpy(), rtol=1e-11)
    assert state.accumulated.weight == whole.accumulated.weight
    assert state.accumulated.squares == whole.accumulated.squares


@pytest.mark.parametrize("half_life", [1e-3, 5e-324])
def test_a_history_that_has_faded_altogether_is_no_matter(half_life: float) -> None:
    """Neither its rounding nor its infinities: only the last batch counts, and one value has the variance 1."""
    past = [np.array([[1e300], [-1e300]]), np.array([[1e16]])]
    state = _train(_layer(1, half_life=half_life, non_finite="allow"), [*past, np.array([[1.0], [2.0], [6.0]])])
    assert (state.running_mean.item(), state.samples_tracked) == (3.0, 6)
    assert state.running_var.item() == pytest.approx(7.0, rel=1e-12)
    assert _train(state, [np.array([[4.0]])]).running_var.item() == 1.0


def test_a_light_history_costs_the_new_mean_no_digits() -> None:
    """After 100 half-lives 1e16 weighs less than 1e-13 beside 1: the mean is 1, and not 1e16 - (1e16 - 1)."""
    state = _train(_layer(1, half_life=1.0), [np.array([[1e16]]), np.full((100, 1), 1.0)])
    assert state.running_mean.item() == pytest.approx(1.0, rel=1e-12)


def test_a_mean_whose_square_overflows_is_exact() -> None:
    batch = np.array([[1e200], [1e200]])
    assert _train(_layer(1), [batch]).running_mean.item() == 1e200
    assert _train(_layer(1), [batch]).running_var.item() == 0.0


def test_a_record_with_the_sums_of_an_earlier_version_still_loads_and_forgets_them() -> None:
    """Earlier versions took a batch's share of the squares as that of its samples one by one."""
    samples = np.random.default_rng(14).normal(size=(640, 2))
    batches = np.split(samples, 10)
    state = _train(_layer(2, half_life=5.0), batches[:5])
    weights = 2.0 ** (-np.arange(320) / 5)
    old = torch.tensor([weights.sum(), (weights**2).sum()], dtype=torch.float64)
    tensors = state_dict(state) | {"population_weights": to_wire(old)}
    loaded = state.accumulator.read(tensors, state.samples_tracked)
    assert (loaded.weight, loaded.squares) == tuple(old.tolist())
    after = _train(state._replace(accumulated=loaded), batches[5:])
    assert torch.allclose(after.running_var, _train(state, batches[5:]).running_var, rtol=1e-12)


def test_after_one_half_life_the_past_counts_half() -> None:
    state = _train(_layer(1, half_life=1000.0), [np.full((100_000, 1), 10.0), np.zeros((1000, 1))])
    assert state.running_mean.item() == pytest.approx(5.0, rel=1e-6)


def test_a_very_long_half_life_forgets_nothing() -> None:
    samples = np.random.default_rng(6).normal(size=(100, 1))
    forgetting, keeping = (
        _train(_layer(1, half_life=1e300), np.split(samples, 4)),
        _train(_layer(1), np.split(samples, 4)),
    )
    assert np.allclose(forgetting.running_var.numpy(), keeping.running_var.numpy(), rtol=1e-12)


def test_counts_survive_export_and_import_also_when_some_is_forgotten() -> None:
    samples = np.random.default_rng(7).normal(size=(90, 3))
    for config in ({}, {"half_life": 20.0}):
        whole = _train(_layer(3, **config), np.split(samples, 3))
        half = _train(_layer(3, **config), np.split(samples, 3)[:2])
        moved = replace_tensors(_layer(3, **config), state_dict(half))
        after = _train(moved, np.split(samples, 3)[2:])
        assert torch.equal(after.running_mean, whole.running_mean)
        assert torch.equal(after.running_var, whole.running_var)
        assert after.samples_tracked == 90
        again = after.accumulator.read(state_dict(after), after.samples_tracked)
        assert (again.weight, again.squares) == (after.accumulated.weight, after.accumulated.squares)


def test_running_statistics_that_contradict_the_accumulators_are_refused() -> None:
    state = _train(_layer(2), [np.random.default_rng(8).normal(size=(5, 2))])
    with pytest.raises(errors.InvalidRequest) as refused:
        replace_tensors(state, {"running_mean": to_wire(torch.zeros(2, dtype=torch.float64))})
    assert refused.value.fields["field"] == "running_mean"
    fewer = {name: tensor for name, tensor in state_dict(state).items() if name != "running_mean"}
    assert torch.equal(replace_tensors(_layer(2), fewer).running_mean, state.running_mean)
    assert to_torch(state_dict(state)["samples_tracked"]).item() == 5


def test_reset_forgets_the_population() -> None:
    state = reset(_train(_layer(2), [np.random.default_rng(9).normal(size=(5, 2))]), "running_stats")
    assert (state.samples_tracked, state.accumulated.weight) == (0, 0.0)
    assert state.running_var.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("half_life", [1e6, 1e12, 1e15, 1e300])
def test_long_half_lives_weigh_every_sample_as_one(half_life: float) -> None:
    """1 - 2^(-1/h) has no digits left for a long half-life: 2^(-1/1e15) is 1 to float64."""
    state = _train(_layer(1, half_life=half_life), [np.array([[1.0], [2.0], [6.0]])])
    assert state.accumulated.weight == pytest.approx(3, rel=1e-5)
    assert state.running_var.item() == pytest.approx(7, rel=1e-5)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"population_weights": [float("nan"), 0.0]}, "population_weights"),
        ({"population_weights": [2.0, 100.0]}, "population_weights"),
        ({"population_weights": [50.0, 50.0]}, "population_weights"),
        ({"population_m2": [-1.0, 0.0]}, "population_m2"),
    ],
)
def test_accumulators_that_no_samples_have_are_refused(tensors: dict, field: str) -> None:
    state = _train(_layer(2), [np.random.default_rng(8).normal(size=(5, 2))])
    wire = {name: to_wire(torch.tensor(value, dtype=torch.float64)) for name, value in tensors.items()}
    with pytest.raises(errors.InvalidRequest) as refused:
        replace_tensors(state, wire)
    assert refused.value.fields["field"] == field
    nothing = {
        "samples_tracked": to_wire(torch.tensor(0)),
        "population_m2": to_wire(torch.ones(2, dtype=torch.float64)),
    }
    with pytest.raises(errors.InvalidRequest):
        replace_tensors(state, nothing)
    assert _train(replace_tensors(state, {"samples_tracked": to_wire(torch.tensor(0))}), []).running_var.tolist() == [
        1,
        1,
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_statistics_of_one_value_in_half_precision(dtype: torch.dtype) -> None:
    """Where torch's kernel gives no variance, an unbiased one was computed, which is NaN, and so was batch_invstd."""
    config = LayerConfig(num_features=2, statistics="population", affine=False, track_running_stats=False, eps=0.25)
    step = train_step(initial_state(config), torch.tensor([[1.0, -3.0]], dtype=dtype))
    assert step.output.tolist() == [[0.0, 0.0]]
    assert step.mean.tolist() == [1.0, -3.0]
    assert step.invstd.tolist() == [2.0, 2.0]
