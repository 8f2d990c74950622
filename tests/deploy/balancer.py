"""nginx.conf of deploy/ in a real nginx, in front of servers on ports of this machine."""

import contextlib
import re
import shutil
import socket
import subprocess

import pytest

from store.valkey_servers import free_port, wait_for

from .files import DEPLOY

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx: apt-get install nginx-light")


def configuration(directory, listen, ports):
    """The file with other addresses and folders, and for a version before 1.27.3 without `resolve`."""

    def replace(pattern, by, count):
        nonlocal text
        text, found = re.subn(pattern, by, text, flags=re.M)
        assert found == count, pattern

    text = (DEPLOY / "nginx.conf").read_text()
    replace(r"\blisten 8080;", f"listen 127.0.0.1:{listen};", 1)
    replace(r"/tmp/", f"{directory}/", 6)
    servers = iter(ports)
    if version() < (1, 27, 3):
        replace(r"(?<=:8000) resolve\b", "", 3)
    replace(r"\bserver replica-\d:8000\b", lambda _: f"server 127.0.0.1:{next(servers)}", 3)
    return text


def version():
    told = subprocess.run([NGINX, "-v"], capture_output=True, text=True, check=True).stderr
    return tuple(map(int, re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", told).groups()))


def command(directory, listen, ports):
    (directory / "nginx.conf").write_text(configuration(directory, listen, ports))
    return [NGINX, "-c", directory / "nginx.conf", "-e", "stderr", "-g", "daemon off;"]


@contextlib.contextmanager
def balancing(directory, ports):
    """The address of an nginx in front of these ports."""
    directory.mkdir()
    listen = free_port()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command(directory, listen, ports), stderr=log)
    try:
        wait_for("nginx listens", lambda: process.poll() is not None or answers(listen))
        assert process.poll() is None, (directory / "log").read_text()
        yield f"http://127.0.0.1:{listen}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
