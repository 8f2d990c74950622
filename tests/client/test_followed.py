"""What a follower knows: states and responses to frames, in whatever order they arrive."""

import numpy as np
import pytest

from batchnorm_client import ConnectionFailed
from batchnorm_client.core.followed import Followed
from batchnorm_client.kernels.moments import BatchMoments
from batchnorm_client.results import LayerStates
from batchnorm_client.wire.documents import LayerConfig

CONFIG = LayerConfig(num_features=1, momentum=0.5, affine=False)


def batch(mean):
    return BatchMoments(2, np.array([mean]), np.array([1.0]))


def states(version, *means):
    """The layer after these batches."""
    running = 0.0
    for mean in means:
        running = 0.5 * running + 0.5 * mean
    tensors = {
        "running_mean": np.array([running], np.float32),
        "running_var": np.array([1.0], np.float32),
        "num_batches_tracked": np.array(len(means)),
    }
    return LayerStates({"obs": tensors}, {"obs": CONFIG}, {"obs": version}, f'"{version}"')


def mean_of(state):
    return state.local.running_mean.item()


@pytest.fixture
def followed():
    """A follower that has observed batches of mean 8 and 4, of which the first is on its way in a frame."""
    followed = Followed("obs", states(1), 0.0)
    followed.add(batch(8.0), 1.0)
    followed.add(batch(4.0), 2.0)
    followed.frame = followed.take(1, "key")
    return followed


SEES_BOTH = 0.5 * (0.5 * 8.0) + 0.5 * 4.0


def test_a_state_with_its_own_frame_before_the_response(followed):
    followed.arrived(states(2, 8.0), 3.0)
    assert mean_of(followed.newest) == 4.0
    assert mean_of(followed.current()) == SEES_BOTH
    followed.folded(followed.frame, 2)
    assert mean_of(followed.current()) == SEES_BOTH
    assert (followed.kept, followed.unsettled) == (1, 1)


def test_the_response_before_the_state(followed):
    followed.folded(followed.frame, 2)
    assert mean_of(followed.current()) == SEES_BOTH
    assert (followed.kept, followed.unsettled) == (2, 1)
    followed.arrived(states(2, 8.0), 3.0)
    assert mean_of(followed.current()) == SEES_BOTH
    assert followed.kept == 1


def test_a_state_of_others_before_the_frame_was_folded(followed):
    followed.arrived(states(2, 2.0), 3.0)
    assert mean_of(followed.newest) == 1.0
    followed.folded(followed.frame, 3)
    assert mean_of(followed.current()) == 0.5 * (0.5 * 1.0 + 0.5 * 8.0) + 0.5 * 4.0
    followed.arrived(states(3, 2.0, 8.0), 4.0)
    assert mean_of(followed.current()) == 0.5 * (0.5 * 1.0 + 0.5 * 8.0) + 0.5 * 4.0


def test_a_frame_that_is_given_up(followed):
    followed.give_up(followed.frame, ConnectionFailed("away"))
    assert mean_of(followed.current()) == 2.0
    assert followed.unsettled == 1
    failure = followed.take_failure()
    assert (str(failure), failure.__notes__) == ("away", ["1 observed batches of layer 'obs' are given up"])
    assert followed.take_failure() is None


def test_an_error_says_how_many_were_given_up_since_the_last(followed):
    """Those of the second frame were not in any error's note."""
    followed.give_up(followed.frame, ConnectionFailed("away"))
    followed.give_up(followed.take(1, "second"), ConnectionFailed("still away"))
    failure = followed.take_failure()
    assert (str(failure), failure.__notes__) == ("away", ["2 observed batches of layer 'obs' are given up"])


def test_how_old_a_state_is(followed):
    """That of observe is older while a frame's outcome is not known and another state is there."""
    followed.arrived(followed.states, 3.0)
    assert (followed.confirmed, followed.base_confirmed) == (3.0, 3.0)
    followed.arrived(states(2, 2.0), 4.0)
    assert (followed.confirmed, followed.base_confirmed) == (4.0, 3.0)
    followed.arrived(followed.states, 5.0)
    assert (followed.confirmed, followed.base_confirmed) == (5.0, 3.0)
    followed.folded(followed.frame, 3)
    assert followed.base_confirmed == 5.0
