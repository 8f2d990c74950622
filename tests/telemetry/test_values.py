"""The rows of several processes. A lock belongs to an open file, so two rows in one process are as two processes."""

import gc

import pytest

from batchnorm_service.telemetry import Metrics
from batchnorm_service.telemetry.metrics import FOLDS, QUEUED_UPDATES
from batchnorm_service.telemetry.values import Values

from .reading import read, total


def rows(values):
    return sorted((row.tolist(), lives) for row, lives in values.rows())


def test_a_process_reads_what_others_have_written(tmp_path):
    one, other = Values(2, tmp_path), Values(2, tmp_path)
    one.own[0], other.own[1] = 1, 2
    assert rows(one) == rows(other) == [([0, 2], True), ([1, 0], True)]


def test_what_a_dead_process_wrote_stays_and_the_next_counts_on(tmp_path):
    one, other = Values(2, tmp_path), Values(2, tmp_path)
    one.own[0], other.own[0] = 1, 5
    del other
    gc.collect()
    assert rows(one) == [([1, 0], True), ([5, 0], False)]
    third, fourth = Values(2, tmp_path), Values(2, tmp_path)
    third.own[0] += 1
    assert rows(one) == rows(fourth) == [([0, 0], True), ([1, 0], True), ([6, 0], True)]
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_place_to_share_them_metrics_are_the_processs_own(tmp_path, caplog):
    values = Values(2, tmp_path / "nowhere")
    values.own[0] = 1
    assert rows(values) == [([1, 0], True)]
    assert "cannot be shared" in caplog.text


@pytest.mark.parametrize("lives", [True, False])
def test_counters_of_the_dead_are_summed_and_gauges_are_not(tmp_path, lives):
    build = {"route": ("other",), "version": ("0",), "python": ("0",), "torch": ("0",)}
    one, other = Metrics(build, tmp_path), Metrics(build, tmp_path)
    for each, count in ((one, 1), (other, 10)):
        each.counter(FOLDS).add(count)
        each.gauge(QUEUED_UPDATES, lambda count=count: count)
        each.read_gauges()
    if not lives:
        del other, each
        gc.collect()
    found = read(one.render("")[0].decode())
    assert total(found, "batchnorm_folds_total") == 11
    assert total(found, "batchnorm_queued_updates") == (11 if lives else 1)
    assert total(found, "batchnorm_workers") == (2 if lives else 1)
    third = Metrics(build, tmp_path)
    found = read(third.render("")[0].decode())
    assert total(found, "batchnorm_folds_total") == 11
    assert total(found, "batchnorm_queued_updates") == (11 if lives else 1)  # the third has not said a number yet
    assert total(found, "batchnorm_worker_starts_total") == 3
