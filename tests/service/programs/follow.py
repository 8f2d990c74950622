"""Follows a layer and observes samples that are 1 in one channel: a program for test_follower_crashes.py.

    python follow.py URL LAYER CHANNEL SAMPLES

Prints how many samples are folded, whenever it knows.
"""

import sys

import numpy as np

from batchnorm_client import Client, Retry

FLUSH_EVERY = 40


def main(url, name, channel, samples):
    with Client(url, retry=Retry(attempts=1000, deadline=60)) as client:
        channels = client.layer(name).inspect().config.num_features
        sample = np.eye(channels, dtype=np.float32)[channel]
        with client.follow(name, sync_every=0.01, sync_batches=10, timeout=60) as follower:
            for number in range(samples):
                follower.observe(sample)
                if number % FLUSH_EVERY == FLUSH_EVERY - 1:
                    follower.flush()
                    print(number + 1, flush=True)
        print(samples, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
