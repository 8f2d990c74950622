"""`python -m benchmarks.page`: how long the pages take in Chromium, and the service for them.

A layer with 4,096 channels is usable when its charts and the table of its channels are there; the list of 100,000
layers, when its rows are. Medians; the browser and the service share the machine, and the browser starts without cache.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from batchnorm_client import Client, LayerConfig
from batchnorm_service.layers import Layers
from batchnorm_service.store.base import StoreOptions
from batchnorm_service.store.registry import store_from_url
from benchmarks.process import service

_CHANNELS = 4096
_READY = {"layer": "#channel-table tbody tr", "list": "#list tbody tr"}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("--layers", type=int, default=100_000, help="in the store (100,000)")
    parser.add_argument("--times", type=int, default=9, help="that each page is opened (9)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = f"sqlite:///{Path(directory) / 'layers.db'}"
        asyncio.run(_fill(store, given.layers))
        server = service(store)
        try:
            _measure(f"http://127.0.0.1:{server.port}", given.layers, given.times)
        finally:
            server.stop()


async def _fill(url: str, count: int) -> None:
    """Create the layers before the service starts, a thousand at a time."""
    store = store_from_url(url, StoreOptions(3600.0))
    await store.open()
    layers, config = Layers(store), LayerConfig(num_features=8)
    for first in range(0, count - 1, 1000):
        numbers = range(first, min(first + 1000, count - 1))
        await asyncio.gather(*(layers.create(f"net{number % 100:02}.layer{number}", config) for number in numbers))
    await layers.close()
    await store.close()


def _measure(url: str, layers: int, times: int) -> None:
    random = np.random.default_rng(0)
    with Client(url) as client:
        wide = client.create_layer("wide", num_features=_CHANNELS)
        for _ in range(20):
            wide.train(random.normal(size=(32, _CHANNELS)).astype(np.float32))
    paths = {
        f"a layer of {_CHANNELS:,} channels": ("layer", "/ui/layers/wide"),
        f"the list of {layers:,} layers": ("list", "/ui"),
        "a name that starts with": ("list", "/ui?q=net99.layer9"),
        "a name that contains": ("list", "/ui?q=layer9&match=contains"),
        "in another order": ("list", "/ui?sort=updated&order=desc"),
    }
    print("| ms | until usable | of that, the service | asked again (304) |\n|---|---|---|---|")
    with sync_playwright() as playwright, httpx.Client(base_url=url, headers={"Accept": "text/html"}) as http:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (kind, path) in paths.items():
            opened = median(_opened(browser, url + path, _READY[kind]) for _ in range(times))
            tag = http.get(path).headers["etag"]
            served = median(_milliseconds(lambda path=path: http.get(path)) for _ in range(times))
            known = {"If-None-Match": tag}
            again = median(_milliseconds(lambda path=path: http.get(path, headers=known)) for _ in range(times))  # noqa: B023
            print(f"| {name} | {opened:.0f} | {served:.1f} | {again:.1f} |")
        browser.close()


def _opened(browser: Browser, url: str, ready: str) -> float:
    """Milliseconds from a new profile's request to a page that can be used."""
    context = browser.new_context()
    page: Page = context.new_page()
    taken = _milliseconds(lambda: (page.goto(url), page.locator(ready).first.wait_for()))
    context.close()
    return taken


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
