"""Make an SQLite file with an older release, for `test_sqlite_upgrade.py`: `python make.py CHECKOUT FILE`.

CHECKOUT is a work tree of the commit that is to write the file. Its service is started, called, and killed, so that a
group is left open in the file where the release kept groups there. Receipts last for centuries.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx

RECEIPT_SECONDS: Final = 10**10
BATCHES: Final = tuple([[0.5 * n, 1.0, -2.0 * n], [1.5, n * n / 4, 3.0], [-n, 0.25, 0.125]] for n in range(1, 5))
"""Three batches under the keys `old-1` to `old-3`, and one without a key."""

SHARDS: Final = ([[1.0, 2.0], [3.0, 5.0]], [[-1.0, 4.0]])
"""Of the group that is closed; the first alone is in the one that is left open."""

MOMENTS: Final = {"count": 3, "mean": [1.0, 2.0], "var": [0.5, 0.25]}


def post(http: httpx.Client, path: str, body: dict[str, Any], key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return http.post(path, json=body, headers=headers)


def fill(http: httpx.Client) -> None:
    for name, config in {
        "moving": {"num_features": 3},
        "population": {"num_features": 2, "statistics": "population"},
        "grouped": {"num_features": 2, "momentum": None},
        "gone": {"num_features": 1},
    }.items():
        made = http.put(f"/v1/layers/{name}", json=config)
        assert made.is_success or made.status_code == 501, made.text  # the first release had no population statistics
    for n, batch in enumerate(BATCHES, 1):
        post(http, "/v1/layers/moving/train", {"input": batch}, f"old-{n}" if n < 4 else None).raise_for_status()
    for _ in range(3):
        post(http, "/v1/layers/gone/train", {"input": [[1.0], [2.0]]}).raise_for_status()
    http.delete("/v1/layers/gone").raise_for_status()
    if post(http, "/v1/layers/population/train", {"input": SHARDS[0]}, "population").status_code == 404:
        return
    if post(http, "/v1/layers/population/moments", MOMENTS, "moments").status_code == 501:
        return  # nor groups
    shard = ({"input": shard} for shard in SHARDS)
    path = "/v1/layers/grouped/train?group=closed&size=2"
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(post, http, path, body, f"member-{n}") for n, body in enumerate(shard, 1)]
        if [call.result().status_code for call in calls] != [200, 200]:
            return
    gradients = {"input": SHARDS[0], "grad_output": [[1.0, 0.0], [0.0, 1.0]]}
    post(http, "/v1/layers/grouped/backward?group=closed&size=1", gradients, "member-1").raise_for_status()
    with contextlib.suppress(httpx.HTTPError):  # nobody else comes
        http.post(
            "/v1/layers/grouped/train?group=open&size=2",
            json={"input": SHARDS[0]},
            headers={"Idempotency-Key": "open-1"},  # "member-1" in files of schemas 1 and 2
            timeout=2,
        )


def fill_history(http: httpx.Client) -> None:
    """A batch, a pin of it, a batch, a reset, a pin, and back to the first pin; where the release has that."""
    layer = "/v1/layers/history"
    http.put(layer, json={"num_features": 3}).raise_for_status()
    post(http, f"{layer}/train", {"input": BATCHES[0]}).raise_for_status()
    if http.put(f"{layer}/pins/first", json={}).status_code in {404, 405}:
        http.delete(layer).raise_for_status()
        return
    post(http, f"{layer}/train", {"input": BATCHES[1]}).raise_for_status()
    post(http, f"{layer}/reset", {}).raise_for_status()
    http.put(f"{layer}/pins/empty", json={}).raise_for_status()
    post(http, f"{layer}/rollback", {"tag": "first"}, "back").raise_for_status()


def main(checkout: Path, path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm_service", "serve", "--port", "0", "--store", f"sqlite:///{path}"],
        env=os.environ
        | {
            "PYTHONPATH": f"{checkout / 'client'}{os.pathsep}{checkout / 'service'}",
            "BATCHNORM_RECEIPT_SECONDS": str(RECEIPT_SECONDS),
            "BATCHNORM_HISTORY_SECONDS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    url = next(found[1] for line in process.stdout if (found := re.search(r"address +(http\S+)", line)))
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        with httpx.Client(base_url=url, timeout=30) as http:
            fill(http)
            fill_history(http)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with contextlib.closing(sqlite3.connect(path)) as connection:  # copies the log back: one file is left
        connection.execute("SELECT * FROM meta").fetchall()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
