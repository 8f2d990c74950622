"""Settings of the garbage collector in a started process."""

import subprocess
import sys

PROGRAM = """
import gc
from collections import deque
from batchnorm_service.memory import settle_memory

imported = [[] for _ in range(300_000)]
gc.collect()
settle_memory()
recent = deque(maxlen=1000)
most = 0
for number in range(600_000):
    cycle = []
    cycle.append(cycle)
    recent.append(cycle)
    if number % 1000 == 0:
        most = max(most, len(gc.get_objects()))
print(most)
"""


def test_garbage_does_not_wait_for_a_quarter_of_all_that_was_imported():
    """A full collection used to wait for 75,000 new objects, a quarter of those that it no longer visits."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000
