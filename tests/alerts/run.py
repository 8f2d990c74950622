"""`make alerts`: provoke every alert of deploy/prometheus-alerts.yaml with real services and a real Prometheus.

Its durations are made 30 times shorter (5m becomes 10s), so that it takes two minutes. Needs the program `prometheus`
(Debian's package of that name has it).
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import yaml

from service.conftest import COMMAND, Process
from service.test_workers import worker_pids

RULES = Path(__file__).parents[2] / "deploy/prometheus-alerts.yaml"
SHORTER = 30
SECONDS = 240
BATCH = {"input": [[1, 2], [3, 5]]}
FAULTY = """
import asyncio
from batchnorm_service.__main__ import main
from batchnorm_service.layers.batches import Batches
from batchnorm_service.store.memory import MemoryStore

commit = MemoryStore.commit

async def slow(self, *args):
    await asyncio.sleep(0.5)
    return await commit(self, *args)

async def broken(self, *args, **options):
    raise RuntimeError("a planted bug")

MemoryStore.commit, Batches.inverse = slow, broken
main()
"""


def shorter(text):
    """Rules whose durations are as much shorter."""
    seconds = {"s": 1, "m": 60, "h": 3600}
    return re.sub(r"(?<![\w.])(\d+)([smh])\b", lambda m: f"{int(m[1]) * seconds[m[2]] * 1000 // SHORTER}ms", text)


class Load:
    """Calls in threads, until the end."""

    def __init__(self, stack):
        self._stack = stack
        self._over = threading.Event()

    def repeat(self, call, threads=1, pause=0.05):
        for _ in range(threads):
            thread = threading.Thread(target=self._run, args=(call, pause))
            thread.start()
            self._stack.callback(thread.join)
            self._stack.callback(self._over.set)  # before it is waited for

    def _run(self, call, pause):
        with httpx.Client(timeout=60) as client:
            while not self._over.wait(pause):
                with contextlib.suppress(httpx.HTTPError):
                    call(client)


def post(url):
    return lambda client: client.post(url, json=BATCH)


def create(service, *names):
    for name in names:
        httpx.put(f"{service.url}/v1/layers/{name}", json={"num_features": 2}).raise_for_status()
    return [f"{service.url}/v1/layers/{name}" for name in names]


def provoke(start, load, directory):
    """Start services and load; returns what is to be done once Prometheus has scraped them, and their addresses."""
    lost = start("--store", f"sqlite:///{directory}/lost.db", BATCHNORM_STORE_TIMEOUT_SECONDS="1")
    (layer,) = create(lost, "a")
    load.repeat(post(f"{layer}/train"))

    faulty = start(
        "--store", "memory:", command=[sys.executable, "-c", FAULTY, *COMMAND[3:]], BATCHNORM_QUEUE_LENGTH="1"
    )
    (layer,) = create(faulty, "a")
    load.repeat(post(f"{layer}/train"), threads=6)
    load.repeat(post(f"{layer}/inverse"))

    workers = start("--store", f"sqlite:///{directory}/workers.db", "--workers", "4")
    (layer,) = create(workers, "a")
    load.repeat(post(f"{layer}/train"), threads=16, pause=0)

    cold = start("--store", f"sqlite:///{directory}/cold.db", BATCHNORM_RESIDENT_LAYERS="1")
    layers = itertools.cycle(create(cold, *"abcd"))
    load.repeat(lambda client: client.post(f"{next(layers)}/eval", json=BATCH))

    down = start("--store", "memory:")

    def then():
        (directory / "lost.db").unlink()
        os.kill(min(worker_pids(workers.process.pid)), signal.SIGKILL)
        down.close()

    return then, [each.url.removeprefix("http://") for each in (lost, faulty, workers, cold, down)]


def prometheus(stack, directory, targets):
    """The address of a Prometheus that scrapes these targets."""
    (directory / "rules.yaml").write_text(shorter(RULES.read_text()))
    scrape = {"job_name": "batchnorm", "static_configs": [{"targets": targets}]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{directory}/rules.yaml"],
        "scrape_configs": [scrape],
    }
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data"]
    program = os.environ.get("PROMETHEUS") or "prometheus"
    log = stack.enter_context((directory / "prometheus.log").open("w"))
    process = subprocess.Popen([program, *options, f"--web.listen-address={address}"], stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return f"http://{address}"


def main():
    if not shutil.which(os.environ.get("PROMETHEUS") or "prometheus"):
        sys.exit("there is no program `prometheus`: install Debian's package, or name it by PROMETHEUS=...")
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(*arguments, **variables):
            process = Process(*arguments, **variables)
            stack.callback(process.close)
            assert process.url, process.output
            return process

        then, targets = provoke(start, Load(stack), directory)
        address = prometheus(stack, directory, targets)
        began, fired, done = time.monotonic(), {}, False
        while fired.keys() != alerts and (seconds := time.monotonic() - began) < SECONDS:
            time.sleep(1)
            with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
                for alert in httpx.get(f"{address}/api/v1/alerts").json()["data"]["alerts"]:
                    name = alert["labels"]["alertname"]
                    if alert["state"] == "firing" and name not in fired:
                        fired[name] = alert["annotations"]["summary"]
                        print(f"{seconds:4.0f} s  {name}: {fired[name]}", flush=True)
            if seconds > 15 and not done:
                then()
                done = True
    if missing := alerts - fired.keys():
        sys.exit(f"not provoked: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
