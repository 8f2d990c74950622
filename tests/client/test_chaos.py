"""A thousand train calls through a bad network: every one counts exactly once, whatever the proxy did to it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from batchnorm_client import Retry
from client.chaos import FATES, Proxy

CALLS = 1000
AT_ONCE = 8
PATIENT = Retry(attempts=1000, deadline=100, wait_initial=0.001, wait_max=0.005)


def test_every_call_counts_exactly_once(connect, url, other, name):
    batches = np.random.default_rng(0).normal(3, 2, size=(CALLS, 5, 4)).astype(np.float32)
    other.create_layer(name, 4)
    with Proxy(url, seed=0) as proxy:
        # Only "keep silent" waits for this timeout. Were it too short for a slow machine, there would be more repeats.
        client = connect(proxy.url, retry=PATIENT, timeout=0.5)
        layer = client.layer(name)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = list(pool.map(layer.train, batches))
        client.close()
    assert set(proxy.fates) == set(FATES)
    assert len(proxy.fates) > 1.2 * CALLS

    assert sorted(result.num_batches_tracked for result in results) == [*range(1, CALLS + 1)]
    assert sum(result.replayed for result in results) > CALLS / 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the service
    try:
        module = torch.nn.BatchNorm1d(4)
        for result, batch in sorted(zip(results, batches, strict=True), key=lambda pair: pair[0].num_batches_tracked):
            np.testing.assert_array_equal(result.output, module(torch.from_numpy(batch)).detach())
    finally:
        torch.set_num_threads(threads)
    state = other.layer(name).state_dict()
    assert state["num_batches_tracked"] == CALLS
    np.testing.assert_array_equal(state["running_mean"], module.running_mean)
    np.testing.assert_allclose(state["running_var"], module.running_var, rtol=1e-5)
