"""The log: a line per event on stderr, as JSON, or as coloured text where stderr is a terminal.

Everything logs with the standard library's `logging`; structlog formats it, also what uvicorn and `warnings` say.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Final, TextIO

import orjson
import structlog
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, WrappedLogger

from .budget import Budget

LINES_PER_SECOND: Final = 100
"""How many requests are logged in a second because they are slow or failed: the log of an overloaded service, or one
without its store, must not be what fills the disk."""

_FIRST: Final = ("timestamp", "level", "logger", "event")
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != ord("\n")}
_log: Final = logging.getLogger("batchnorm_service.requests")


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Log to `stream`, by default stderr: text if it is a terminal, else JSON. Replaces what was configured before."""
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(text=stream.isatty(), colors=not os.environ.get("NO_COLOR")))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def _formatter(*, text: bool, colors: bool) -> logging.Formatter:
    # The traceback is made here in both cases: structlog's own for terminals shows local variables, which are tensors
    # and tokens.
    added: list[Any] = [add_log_level, add_logger_name, ExtraAdder(), structlog.processors.format_exc_info]
    time = structlog.processors.TimeStamper(fmt="iso", utc=True)
    last: list[Any] = [_in_order, structlog.processors.JSONRenderer(_to_json)]
    if text:
        plain = structlog.dev.plain_traceback
        last = [_printable, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    processors = [ProcessorFormatter.remove_processors_meta, *last]
    return ProcessorFormatter(processors=processors, foreign_pre_chain=[*added, time])


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {name: event.pop(name) for name in _FIRST if name in event} | dict(event)


def _to_json(event: EventDict, **_options: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters, with which a text could forge a line or command the terminal."""
    for name, value in event.items():
        if isinstance(value, str):
            escaped = value.translate(_CONTROL)
            event[name] = escaped if name == "exception" else escaped.replace("\n", "\\n")
    return event


class RequestLog:
    """Writes a line for each request that is slow, has failed, or is to be logged in any case.

    Args:
        access: whether all requests are logged.
        slow_seconds: a request that takes this long is logged; 0 for none.

    Attributes:
        seconds: requests that take this long are logged, whatever their outcome.
    """

    def __init__(self, *, access: bool = False, slow_seconds: float = 0.0) -> None:
        self.seconds: Final = 0.0 if access else slow_seconds or float("inf")
        self._access = access
        self._slow_seconds = slow_seconds or float("inf")
        self._budget = Budget(LINES_PER_SECOND)

    def wants(self, status: int, seconds: float) -> bool:
        """Whether a request is to be written."""
        return seconds >= self.seconds or status >= 500

    def write(self, status: int, seconds: float, **fields: str | int | None) -> None:
        """Write a line.

        Args:
            status: of the response; 0 if the client left before it.
            seconds: from the end of the request to its response.
            fields: the others of the line.
        """
        slow = seconds >= self._slow_seconds
        level = logging.ERROR if status == 500 else logging.WARNING if slow or status >= 500 else logging.INFO
        if not _log.isEnabledFor(level):
            return
        left_out: dict[str, str | int | float] = {}
        if not self._access:
            if not self._budget.take():
                return
            if self._budget.refused:
                left_out = {"left_out": self._budget.refused}
                self._budget.refused = 0
        event = "slow request" if slow else "request"
        given: dict[str, str | int | float] = {name: value for name, value in fields.items() if value is not None}
        _log.log(level, event, extra=given | {"status": status, "seconds": round(seconds, 6)} | left_out)
