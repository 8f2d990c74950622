"""The service as a process of its own, on a free port."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest

COMMAND = [sys.executable, "-m", "batchnorm_service", "serve", "--port", "0"]


def environment(**variables):
    """This process's environment without settings of the service, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_")}
    return kept | {"PYTHONWARNINGS": "error", **variables}


class Process:
    """A running service.

    Args:
        arguments: of the command.
        command: that starts it.
        variables: of its environment.

    Attributes:
        url: its address.
        lines: what it has printed so far, both streams together.
    """

    def __init__(self, *arguments, command=COMMAND, **variables):
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        self.url = ""
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"address +(http\S+)", line):
                self.url = found[1]
            if "/train" in line:  # the last of the lines that it prints when it listens
                break
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reader.start()

    @property
    def output(self):
        return "".join(self.lines)

    def stop(self, number=signal.SIGTERM):
        """The exit status after this signal."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        status = self.process.wait(timeout=30)
        self._reader.join(timeout=30)
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        self.process.stdout.close()


@pytest.fixture
def start():
    """`start("--store", url)` runs a service; it is killed at the end if it still runs."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **variables):
            process = Process(*arguments, **variables)
            stack.callback(process.close)
            assert process.url, process.output
            return process

        yield start


@pytest.fixture
def store(tmp_path):
    return f"sqlite:///{tmp_path}/layers.db"


@pytest.fixture
def http():
    with httpx.Client(timeout=30) as client:
        yield client
