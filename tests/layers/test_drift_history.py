"""Drift over time: bounded, and nothing that was far is forgotten within its time."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.drift import Drift
from batchnorm_service.layers.drift_history import (
    COLUMNS,
    FIRST_STEP,
    GROUPS,
    LAST_STEP,
    group_size,
    no_history,
    read_history,
    shift_of,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


def drift(*z: float, score: float = 0.0) -> Drift:
    return Drift(1, np.array(z), np.zeros(len(z)), np.full(len(z), score))


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def test_what_is_close_in_time_is_one_column() -> None:
    """Its largest score, and of each channel the z that is farthest from 0."""
    history = no_history(2)
    for second, (z, score) in enumerate([((0.5, -1.0), 0.2), ((-0.75, 0.25), 0.9), ((0.0, 0.0), 0.1)]):
        history = history.then(drift(*z, score=score), at(second))
    assert history.times.tolist() == [START.timestamp()]
    assert history.scores.tolist() == pytest.approx([0.9])
    assert shift_of(history.shifts).tolist() == [[-0.75, -1.0]]
    history = history.then(drift(2.0, 0.0, score=0.3), at(FIRST_STEP))
    assert len(history.times) == 2
    assert shift_of(history.shifts).tolist() == [[-0.75, -1.0], [2.0, 0.0]]


def test_the_step_doubles_when_there_is_no_room() -> None:
    history = no_history(1)
    for column in range(COLUMNS + 1):
        history = history.then(drift(1.0 if column == 3 else 0.0, score=column == 3), at(column * FIRST_STEP))
    assert history.step == 2 * FIRST_STEP
    assert len(history.times) == COLUMNS // 2 + 1
    assert np.argmax(history.scores) == np.argmax(history.shifts) == 1
    assert np.all(np.diff(history.times) == 2 * FIRST_STEP)


def test_after_a_day_the_oldest_go() -> None:
    history, seconds = no_history(1), 0.0
    while seconds < 3 * 86_400:
        history = history.then(drift(0.0, score=seconds), at(seconds))
        assert len(history.times) <= COLUMNS
        seconds += 60.0
    assert history.step == LAST_STEP
    assert history.times[-1] >= at(seconds - 2 * LAST_STEP).timestamp()
    assert np.all(np.diff(history.times) > 0)
    assert np.all(np.diff(history.scores) > 0)
    covered = history.times[-1] - history.times[0]
    assert 86_400 < covered < 2 * 86_400


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (48, 1), (49, 2), (4096, 86), (1 << 20, 21846)])
def test_groups_of_channels(channels: int, size: int) -> None:
    z = np.zeros(channels)
    z[-1] = -3.0
    history = no_history(channels).then(Drift(1, z, z, z), START)
    assert group_size(channels) == size
    groups = history.shifts.shape[1]
    assert groups == -(-channels // size) <= GROUPS
    assert shift_of(history.shifts)[0, -1] == -3.0
    assert np.count_nonzero(history.shifts) == 1


def test_it_is_stored_and_read() -> None:
    history = no_history(3)
    assert read_history(history.tensors(), 3).times.shape == (0,)
    for column in range(5):
        history = history.then(drift(column, -column, 10.0, score=column), at(column * 7.0))
    read = read_history(history.tensors(), 3)
    assert read.step == history.step
    for mine, other in zip(read[1:], history[1:], strict=True):
        assert mine.tolist() == other.tolist()
        assert mine.dtype == other.dtype
    assert sum(tensor.nbytes for tensor in read.tensors().values()) < 6 << 10


def test_what_does_not_fit_is_left_out() -> None:
    """An older release has written none; a layer that was created again may have other channels."""
    history = no_history(3).then(drift(1.0, 2.0, 3.0), START)
    assert len(read_history({}, 3).times) == 0
    assert len(read_history(history.tensors(), 4).times) == 0
    wrong = history.tensors() | {"history_scores": Tensor.of(np.zeros(2, np.float32))}
    assert len(read_history(wrong, 3).times) == 0


def test_the_largest_history_is_small() -> None:
    history = no_history(1 << 20)
    for column in range(COLUMNS):
        history = history.then(Drift(1, *3 * [np.ones(1 << 20)]), at(column * 5.0))
    assert sum(tensor.nbytes for tensor in history.tensors().values()) <= 6 << 10
