"""Reads and writes all receipts of a Valkey store, for transfers between stores."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from batchnorm_service.store.base import Committed, Missing, ReceiptWithTTL, StoreError, StoreRefusedError
from batchnorm_service.store.valkey.address import Node
from batchnorm_service.store.valkey.commands import CommandRunner
from batchnorm_service.store.valkey.connection import FAULTS, Command, Connector, ServerConnection, describe_error
from batchnorm_service.store.valkey.keys import Keys, bucket_of, pack_number, pack_receipt, unpack_receipt
from batchnorm_service.store.valkey.scripts import IMPORT_RECEIPTS, ReplyCode

_KEYS_AT_ONCE: Final = 1000


async def scan(nodes: Sequence[Node], connector: Connector, keys: Keys) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
    """All receipts on these servers, over separate connections. Raises `StoreError`."""
    for node in nodes:
        try:
            connection = await connector.connect(node)
        except StoreRefusedError as error:
            raise StoreError(str(error)) from error
        try:
            cursor = b"0"
            while True:
                command = (b"SCAN", cursor, b"MATCH", keys.any_receipt(), b"COUNT", _KEYS_AT_ONCE)
                ((cursor, found),) = await _ask(connection, [command], connector)
                yield await _read(connection, keys, found, connector)
                if cursor == b"0":
                    break
        except FAULTS as error:
            raise StoreError(f"{node}: {describe_error(error)}") from error
        finally:
            await connection.drop()


async def import_receipts(
    runner: CommandRunner, keys: Keys, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]
) -> Committed | Missing:
    """See `Store.import_receipts`."""
    names = [keys.record(name), *(keys.receipt(name, incarnation, each.receipt.key) for each in receipts)]
    args: list[bytes | int] = [pack_number(incarnation)]
    for _, receipt, seconds in receipts:
        args += [max(math.ceil(1000 * seconds), 1), pack_receipt(receipt)]
    done = await runner.run(IMPORT_RECEIPTS, bucket_of(name), names, args)
    return Committed() if done == ReplyCode.DONE else Missing()


async def _read(
    connection: ServerConnection, keys: Keys, found: Sequence[bytes], connector: Connector
) -> Sequence[ReceiptWithTTL]:
    known = [(key, parts) for key in found if (parts := keys.receipt_of(key)) is not None]
    commands: list[Command] = []
    for key, _ in known:
        commands += [(b"GET", key), (b"PTTL", key)]
    replies = await _ask(connection, commands, connector)
    return [
        ReceiptWithTTL(incarnation, unpack_receipt(own, data), milliseconds / 1000)
        for (_, (incarnation, own)), data, milliseconds in zip(known, replies[::2], replies[1::2], strict=True)
        if data is not None and milliseconds > 0  # not expired since its key was read
    ]


async def _ask(connection: ServerConnection, commands: Sequence[Command], connector: Connector) -> list[Any]:
    async with connector.runtime.timeout(connector.timeout):
        if commands:
            await connection.send(commands)
        return [await connection.read_reply() for _ in commands]
