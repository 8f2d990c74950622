"""The page while data drifts: trains a layer, evaluates batches that change, and takes two pictures of it.

Needs Chromium. Without `--plot` the service runs until it is interrupted, to be looked at.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from batchnorm_client import Client
from batchnorm_service.testing import LocalService

_LAYER = "encoder.stage2.bn1"
_CHANNELS = 128
_SIZE = {"width": 1120, "height": 900}


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=int, default=240, help="that batches come (240); a column of the heat map is 5"
    )
    parser.add_argument("--plot", type=Path, help="where to put the picture; a dark one gets _dark in its name")
    given = parser.parse_args()
    service = LocalService(drift_sampling=1.0).start()
    try:
        print(f"{service.url}/ui/layers/{_LAYER}")
        with service.client() as client:
            _load(client, given.seconds)
        if given.plot is None:
            print("Ctrl-C ends it.")
            time.sleep(86_400)
        else:
            _take_pictures(service.url, given.plot)
    except KeyboardInterrupt:
        pass
    finally:
        service.stop()


def _load(client: Client, seconds: int) -> None:
    random = np.random.default_rng(1)
    channels = np.arange(_CHANNELS)
    mean = 1.5 * np.sin(channels / 11) + random.normal(0, 0.3, _CHANNELS)
    std = 0.5 + random.gamma(2, 0.4, _CHANNELS)
    httpx.post(f"{client.base_url}/ui/example", data={"form_token": ""}, follow_redirects=True).raise_for_status()
    for stage in range(1, 5):
        for block in range(1, 3):
            client.create_layer(f"encoder.stage{stage}.bn{block}", num_features=_CHANNELS)
    layer = client.layer(_LAYER)
    layer.update(weight=1 + random.normal(0, 0.15, _CHANNELS), bias=random.normal(0, 0.2, _CHANNELS))
    for _ in range(100):
        layer.train(random.normal(mean, std, (64, _CHANNELS)).astype(np.float32))
    layer.pin("release-3")
    begun = time.monotonic()
    while (part := (time.monotonic() - begun) / seconds) < 1:
        shift = np.zeros(_CHANNELS)
        shift[40:58] = 1.8 * np.clip((part - 0.35) / 0.3, 0, 1)
        shift[96:100] = -1.2 * (part > 0.6)
        layer.eval(random.normal(mean + shift * std, std, (64, _CHANNELS)).astype(np.float32))
        time.sleep(seconds / 240)


def _take_pictures(url: str, path: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme, where in (("light", path), ("dark", path.with_stem(f"{path.stem}_dark"))):
            page = browser.new_page(viewport=_SIZE, color_scheme=theme)  # type: ignore[arg-type] # one of these
            page.goto(f"{url}/ui/layers/{_LAYER}")
            page.locator("#drift canvas").first.wait_for()
            if theme == "dark":
                _scroll_to(page, "#drift")
            page.wait_for_timeout(500)  # fonts and charts
            page.screenshot(path=where)
            # A few colours are enough, and a tenth of the size.
            Image.open(where).convert("RGB").quantize(128).save(where, optimize=True)
            print(f"{where}: {where.stat().st_size >> 10} KiB")
        browser.close()


def _scroll_to(page: Page, part: str) -> None:
    page.evaluate("part => document.querySelector(part).scrollIntoView({behavior: 'instant'})", part)


if __name__ == "__main__":
    main()
