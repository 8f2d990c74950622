"""Observes three batches and exits without closing the follower: a program for test_follow.py."""

import asyncio
import multiprocessing
import sys

import httpx
import numpy as np

from batchnorm_client import AsyncClient, Client, follower

BATCH = np.ones((2, 3), np.float32)


def observe(url, name, away=False):
    def answer(request):
        if away and request.method == "POST":
            raise httpx.ConnectError("away", request=request)
        return http.send(httpx.Request(request.method, f"{url}{request.url.raw_path.decode()}"))

    http = httpx.Client(timeout=90)
    over = httpx.Client(transport=httpx.MockTransport(answer), base_url=url) if away else None
    followed = Client(url, http=over).follow(name, sync_every=float("inf"))
    for _ in range(3):
        followed.observe(BATCH)


async def observe_async(url, name):
    followed = await AsyncClient(url).follow(name, sync_every=float("inf"))
    for _ in range(3):
        await followed.observe(BATCH)


def main(url, name, way):
    match way:
        case "exit":
            observe(url, name)
        case "multiprocessing":
            process = multiprocessing.get_context("fork").Process(target=observe, args=(url, name))
            process.start()
            process.join()
        case "away":
            follower.EXIT_SECONDS = 0.1
            observe(url, name, away=True)
        case "async":
            asyncio.run(observe_async(url, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
