"""A service in a process of its own, and one way to call both clients."""

import contextlib
import inspect
import os
import re
import socket
import subprocess
import sys
import threading

import anyio.from_thread
import httpx

from batchnorm_client import AsyncClient, Client, Retry
from batchnorm_client.core.runtime import Runtime

NOW = Retry(wait_initial=0, wait_max=0, deadline=30)
"""Tries again at once, so that tests do not wait."""


def environment(**variables):
    """This process's environment without anything of the service or the client, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_")}
    return kept | variables


@contextlib.contextmanager
def serving(**settings):
    """The address of a service over a store in memory."""
    variables = {f"BATCHNORM_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm_service", "serve", "--port", "0", "--store", "memory:"],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"address +(http\S+)", line):
                break
        else:
            raise RuntimeError("".join(printed))
        rest = threading.Thread(target=process.stdout.read)  # so that it never waits for a reader
        rest.start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(timeout=30)
        with contextlib.suppress(UnboundLocalError):
            rest.join(timeout=30)
        process.stdout.close()


class StoppedClock(Runtime):
    """A clock that stands still until a test moves it."""

    def __init__(self):
        self.seconds = 100.0

    def now(self):
        return self.seconds


class Blocking:
    """AsyncClient and what it returns, called as Client and what that returns."""

    def __init__(self, target, portal):
        self._target = target
        self._portal = portal

    def __repr__(self):
        return repr(self._target)

    def __getattr__(self, name):
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*args, **kwargs):
            result = value(*args, **kwargs)
            if inspect.isasyncgen(result):
                return self._items(result)
            if inspect.isawaitable(result):
                result = self._portal.call(_wait, result)
            return (
                Blocking(result, self._portal)
                if hasattr(result, "load_state_dict") or hasattr(result, "observe")
                else result
            )

        return call

    def _items(self, generator):
        try:
            while True:
                try:
                    yield self._portal.call(anext, generator)
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(generator.aclose)

    def close(self, *arguments):
        self._portal.call(self._target.aclose, *arguments)


async def _wait(awaitable):
    return await awaitable


class Clients:
    """Makes clients of one kind, and closes them at the end.

    Attributes:
        kind: "sync" or "async".
    """

    def __init__(self, kind, stack):
        self.kind = kind
        self._stack = stack
        self._portal = stack.enter_context(anyio.from_thread.start_blocking_portal()) if kind == "async" else None

    def __call__(self, url=None, **options):
        options.setdefault("retry", NOW)
        if self.kind == "sync":
            client = Client(url, **options)
        else:
            client = Blocking(self._portal.call(lambda: AsyncClient(url, **options)), self._portal)
        self._stack.callback(client.close)
        return client

    def http(self, **options):
        """An HTTP client of this kind, to be passed in; closed at the end."""
        if self.kind == "sync":
            return self._stack.enter_context(httpx.Client(**options))
        client = httpx.AsyncClient(**options)
        self._stack.callback(lambda: self._portal.call(client.aclose))
        return client

    def close_http(self, http):
        """Close one of these now."""
        if self.kind == "sync":
            http.close()
        else:
            self._portal.call(http.aclose)

    def over(self, handler, **options):
        """A client whose requests `handler(request) -> response` answers, without a socket."""
        return self(http=self.http(transport=httpx.MockTransport(handler), base_url="http://service"), **options)


class Way:
    """The way to a real service, which loses answers.

    Called with a request it forwards it, unless the next of `faults` says otherwise:

        "lost"      the request does not arrive
        "unheard"   the request arrives, the answer does not
        "refused"   the connection is not made
        a status    the request does not arrive, and something in between answers with it
        a function  is called with the request, then the request is forwarded

    Attributes:
        faults: of the calls to come.
        sent: method and path of what was sent.
        headers: of each.
    """

    def __init__(self, url):
        self._http = httpx.Client(base_url=url)
        self.faults = []
        self.sent = []
        self.headers = []

    def __call__(self, request):
        self.sent.append(f"{request.method} {request.url.path.rpartition('/')[2]}")
        self.headers.append(request.headers)
        fault = self.faults.pop(0) if self.faults else None
        match fault:
            case "lost":
                raise httpx.ReadError("lost", request=request)
            case "refused":
                raise httpx.ConnectError("refused", request=request)
            case int():
                return httpx.Response(fault, html="<h1>in between</h1>")
        if callable(fault):
            fault(request)
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        target = request.url.raw_path.decode()
        answer = self._http.request(request.method, target, content=request.content, headers=headers)
        if fault == "unheard":
            raise httpx.ReadTimeout("unheard", request=request)
        return httpx.Response(answer.status_code, content=answer.content, headers=answer.headers)

    def close(self):
        self._http.close()


class Listener:
    """Accepts connections, and does with each what it is told, one after the other.

    Args:
        behave: is called with each connection.
        context: for TLS.

    Attributes:
        url: its address.
        accepted: how many connections there were.
    """

    def __init__(self, behave, context=None):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.socket.getsockname()[1]}"
        self.accepted = 0
        self._behave = behave
        self._context = context
        self._open = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            self.accepted += 1
            self._open.append(connection)
            self._behave(connection)

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self._thread.join()
        for connection in self._open:
            connection.close()


class Relay(Listener):
    """Passes connections on to a service, so that it can count them and end TLS."""

    def __init__(self, url, context=None):
        host, port = url.removeprefix("http://").split(":")
        self._there = (host, int(port))
        self._threads = []
        super().__init__(self._pass_on, context)

    def _pass_on(self, connection):
        there = socket.create_connection(self._there)
        self._open.append(there)
        for each in (connection, there):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target in ((connection, there), (there, connection)):
            self._threads.append(threading.Thread(target=self._copy, args=(source, target)))
            self._threads[-1].start()

    @staticmethod
    def _copy(source, target):
        with contextlib.suppress(OSError, ValueError):  # ValueError: TLS that was shut down
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def close(self):
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().close()
        for thread in self._threads:
            thread.join()
