"""All receipts of a Valkey store at once, to move them to another store: nothing that a call of the service needs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from batchnorm_service.store.base import Committed, Lasting, Missing, StoreError, StoreRefusedError
from batchnorm_service.store.valkey.address import Node
from batchnorm_service.store.valkey.commands import Calls
from batchnorm_service.store.valkey.connection import FAULTS, Command, Dialer, Link, in_words
from batchnorm_service.store.valkey.keys import Keys, bucket_of, pack_number, pack_receipt, unpack_receipt
from batchnorm_service.store.valkey.scripts import REMEMBER, Answer

_KEYS_AT_ONCE: Final = 1000


async def scan(nodes: Sequence[Node], dialer: Dialer, keys: Keys) -> AsyncIterator[Sequence[Lasting]]:
    """The receipts on all these servers, over connections of their own. Raises `StoreError`."""
    for node in nodes:
        try:
            link = await dialer.dial(node)
        except StoreRefusedError as error:
            raise StoreError(str(error)) from error
        try:
            cursor = b"0"
            while True:
                command = (b"SCAN", cursor, b"MATCH", keys.any_receipt(), b"COUNT", _KEYS_AT_ONCE)
                ((cursor, found),) = await _ask(link, [command], dialer.timeout)
                yield await _read(link, keys, found, dialer.timeout)
                if cursor == b"0":
                    break
        except FAULTS as error:
            raise StoreError(f"{node}: {in_words(error)}") from error
        finally:
            await link.drop()


async def remember(
    calls: Calls, keys: Keys, name: str, incarnation: int, receipts: Sequence[Lasting]
) -> Committed | Missing:
    """See `Store.remember`."""
    names = [keys.record(name), *(keys.receipt(name, incarnation, each.receipt.key) for each in receipts)]
    args: list[bytes | int] = [pack_number(incarnation)]
    for _, receipt, seconds in receipts:
        args += [max(math.ceil(1000 * seconds), 1), pack_receipt(receipt)]
    done = await calls.run(REMEMBER, bucket_of(name), names, args)
    return Committed() if done == Answer.DONE else Missing()


async def _read(link: Link, keys: Keys, found: Sequence[bytes], seconds: float) -> Sequence[Lasting]:
    known = [(key, parts) for key in found if (parts := keys.receipt_of(key)) is not None]
    commands: list[Command] = []
    for key, _ in known:
        commands += [(b"GET", key), (b"PTTL", key)]
    replies = await _ask(link, commands, seconds)
    return [
        Lasting(incarnation, unpack_receipt(own, data), milliseconds / 1000)
        for (_, (incarnation, own)), data, milliseconds in zip(known, replies[::2], replies[1::2], strict=True)
        if data is not None and milliseconds > 0  # not expired since its key was read
    ]


async def _ask(link: Link, commands: Sequence[Command], seconds: float) -> list[Any]:
    async with asyncio.timeout(seconds):
        if commands:
            await link.send(commands)
        return [await link.reply() for _ in commands]
