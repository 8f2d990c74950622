"""Valkey servers that are started with the commands of deploy/, on ports of this machine."""

import subprocess
from contextlib import contextmanager, suppress

import valkey

from store.valkey_servers import wait_for

KEPT = {"appendonly": "yes", "appendfsync": "always", "save": ""}
"""What an acknowledged batch needs to survive: docs/durability.md."""


@contextmanager
def running(command, port, password=None, **options):
    """A client of the server that this command starts, and its process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    client = valkey.Valkey(port=port, password=password, decode_responses=True)
    try:
        wait_for("Valkey answers", lambda: process.poll() is not None or answers(client))
        assert process.poll() is None
        yield client, process
    finally:
        client.close()
        process.kill()
        process.wait()


def answers(client):
    with suppress(valkey.ConnectionError):  # a server that loads its file says so in one too
        return client.ping()
    return False


def kept(client):
    return {name: client.config_get(name)[name] for name in KEPT}
