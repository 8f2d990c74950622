"""A proxy between client and service that behaves as badly as a network may, by the dice of a seed."""

import asyncio
import contextlib
import math
import random
import re
import threading

FATES = {
    "pass": 60,
    "lose the request": 4,
    "cut the request": 4,
    "lose the answer": 8,
    "cut the answer": 6,
    "keep silent": 1,
    "answer 502": 3,
    "answer 503": 3,
    "answer 504 after all": 3,
    "duplicate": 4,
    "duplicate later": 4,
}
"""What may become of a request, and how often: more than one in three goes wrong."""

BAD_GATEWAY = b"HTTP/1.1 502 No\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nno"
NEVER_ARRIVE = {"lose the request", "cut the request", "answer 502", "answer 503"}


class Proxy:
    """Listens on a port of its own, in a thread of its own.

    Attributes:
        url: its address.
        fates: what became of the requests, in their order.
    """

    def __init__(self, upstream, seed):
        self._host, port = re.fullmatch(r"http://(.*):(\d+)", upstream).groups()
        self._port = int(port)
        self._dice = random.Random(seed)
        self._tasks = set()
        self._delayed = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),))
        self.fates = []

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_):
        """Returns when the last duplicate was answered."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self):
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._send_delayed(math.inf)
        for task in self._tasks:
            if task.get_name() == "client":
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader, writer):
        task = asyncio.current_task()
        task.set_name("client")
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(await _message(reader), writer):
                pass
        writer.close()
        self._tasks.discard(task)

    async def _exchange(self, request, writer):
        """One request. False ends the connection."""
        (fate,) = self._dice.choices([*FATES], [*FATES.values()])
        self.fates.append(fate)
        self._send_delayed(len(self.fates))
        match fate:
            case "duplicate":
                self._start(request)
            case "duplicate later":
                self._delayed.append((len(self.fates) + self._dice.randrange(1, 50), request))
            case "cut the request":
                await self._upstream(request[: self._dice.randrange(len(request))], finish=False)
        answer = b"" if fate in NEVER_ARRIVE else await self._upstream(request)
        match fate:
            case "lose the answer":
                answer = b""
            case "cut the answer":
                answer = answer[: self._dice.randrange(1, len(answer))]
            case "keep silent":
                await asyncio.sleep(3600)
            case "answer 502" | "answer 503" | "answer 504 after all":
                answer = (
                    b"HTTP/1.1 %b Bad\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nno" % fate[7:10].encode()
                )
        writer.write(answer)
        return not fate.startswith(("lose", "cut"))

    def _send_delayed(self, now):
        """Copies of requests that enough others have overtaken."""
        due = [request for when, request in self._delayed if when <= now]
        self._delayed = [(when, request) for when, request in self._delayed if when > now]
        for request in due:
            self._start(request)

    def _start(self, request):
        self._tasks.add(asyncio.create_task(self._upstream(request)))

    async def _upstream(self, request, *, finish=True):
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            await writer.drain()
            return await _message(reader) if finish else b""
        finally:
            writer.close()


async def _message(reader):
    """An HTTP/1.1 message that has a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return head + await reader.readexactly(int(length[1]) if length else 0)
