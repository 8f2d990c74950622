"""Records as bytes: what is damaged is this service's trouble, and never a caller's malformed body."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import ProblemError
from batchnorm_service.engine.state import initial_state
from batchnorm_service.layers import records
from batchnorm_service.layers.group_result import GroupResult
from batchnorm_service.layers.synchronized import FoldGroup, GradientGroup
from batchnorm_service.store.base import Entry, Record, Stamp

STAMP = Stamp(1, 2, 3)
MADE = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = LayerConfig(num_features=2)
WHOLE = records.encode_new(initial_state(CONFIG), MADE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        WHOLE[:100],
        WHOLE.replace(b"batchnorm-layer/1", b"batchnorm-layer/2"),
        WHOLE.replace(b"created_config", b"crumpled_trunk"),
        WHOLE.replace(b"num_batches_tracked", b"num_batches_trucked").replace(b"running_mean", b"running_moan"),
        WHOLE.replace(b'num_features\\":2', b'num_features\\":3'),
    ],
)
def test_a_damaged_record_is_a_value_error(data):
    """It was a 400 `malformed-body`, told to a caller who had sent none; or a layer that does not fit its config."""
    with pytest.raises(ValueError, match="record") as refused:
        records.decode(Record(STAMP, data))
    assert not isinstance(refused.value, ProblemError)


def test_a_damaged_record_in_a_listing_is_a_value_error():
    with pytest.raises(ValueError, match="record of bn"):
        records.summary(Entry("bn", STAMP, WHOLE[:100]))


@pytest.mark.parametrize("payload", [b"", b"\2\0\0", b"\2\0\0\0\xff\xff\xff\xff" + b"k" * 64])
def test_a_damaged_result_of_a_group_is_a_value_error(payload):
    """The third was read as four billion members, for minutes."""
    with pytest.raises(ValueError, match="result of a group"):
        GroupResult.unpack(payload)


@pytest.mark.parametrize("group", [FoldGroup, GradientGroup])
@pytest.mark.parametrize("totals", [b"", WHOLE[:100], WHOLE])
def test_a_damaged_part_of_a_group_is_a_value_error(group, totals):
    """It was a 400 `malformed-body`, told to a member that had sent none."""
    with pytest.raises(ValueError, match="part of a group") as refused:
        group.unpack(group.__new__(group), totals)
    assert not isinstance(refused.value, ProblemError)


def test_a_whole_record_is_read():
    assert records.record(records.decode(Record(STAMP, WHOLE))).data == WHOLE
