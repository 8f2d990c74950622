"""Targets for what comes from the store or from its settings: records, receipts, results of groups, URLs."""

from __future__ import annotations

import struct

import torch

from batchnorm_client.wire.errors import ProblemError, RequestError
from batchnorm_service.engine.normalize import empty_shape, eval_step
from batchnorm_service.layers import records
from batchnorm_service.layers.group_result import GroupResult
from batchnorm_service.layers.synchronized import FoldGroup, GradientGroup
from batchnorm_service.store.base import HEAD_BYTES, Entry, Record, Stamp, StoreOptions, StoreRefusedError
from batchnorm_service.store.registry import store_from_url
from batchnorm_service.store.sqlite.url import path_of
from batchnorm_service.store.valkey import keys
from batchnorm_service.store.valkey.address import SCHEMES, parse_address
from fuzz.promises import BrokenPromiseError, Refused, attempt, same

SECRET = "hunter2hunter2"
STAMP = Stamp(1, 2, 3)
DAMAGED = (ValueError, struct.error)
OPTIONS = StoreOptions(3600.0)


def read_record(data: bytes) -> None:
    """Damaged bytes are a `ValueError`, never a caller's problem; what is read can be used, and is written the same."""
    kind, body = data[0] % 4, data[1:]
    if kind == 0:
        _check_layer(body)
    elif kind == 1:
        _unless_problem(records.summary, Entry("bn", STAMP, body[:HEAD_BYTES]))
    elif kind == 2:
        result = _unless_problem(GroupResult.unpack, body)
        if not isinstance(result, Refused):
            same(GroupResult.unpack(result.pack()), result, "the result of a group, written and read")
            for group in (FoldGroup, GradientGroup):
                _check_part(group, result.totals)
    else:
        _check_valkey(body)


def _unless_problem(call, *arguments):
    found = attempt(call, *arguments, refusals=DAMAGED)
    if isinstance(found, Refused) and issubclass(found.kind, ProblemError):
        raise BrokenPromiseError(f"{found.kind} for what is in the store")
    return found


def _check_layer(data: bytes) -> None:
    layer = _unless_problem(records.decode, Record(STAMP, data))
    if isinstance(layer, Refused):
        return
    written = records.record(layer).data
    again = records.decode(Record(STAMP, written))
    same(records.record(again).data, written, "the record, written and read")
    config = layer.state.config
    empty = torch.zeros(empty_shape(config), dtype=getattr(torch, config.dtype))
    attempt(eval_step, layer.state, empty, refusals=(RequestError,))


def _check_part(group, totals: bytes) -> None:
    operation = group.__new__(group)  # unpacking needs no layer
    part = _unless_problem(operation.unpack, totals)
    if not isinstance(part, Refused):
        same(operation.pack(operation.unpack(operation.pack(part))), operation.pack(part), "a part, written and read")


def _check_valkey(data: bytes) -> None:
    record = _unless_problem(keys.unpack_record, data)
    if not isinstance(record, Refused):
        same(keys.pack_stamp(record.stamp) + record.data, data, "the record, written again")
    receipt = _unless_problem(keys.unpack_receipt, b"k" * 16, data)
    if not isinstance(receipt, Refused):
        same(keys.pack_receipt(receipt), data, "the receipt, written again")
    named = keys.Keys("bn")
    found = named.receipt_of(data)
    if found is not None:
        same(data.endswith(keys.pack_number(found[0]) + found[1]), True, "the key of a receipt")


def read_url(data: bytes) -> None:
    """A store's URL is refused without a word of its password, or says the same again."""
    try:
        url = data.decode()
    except UnicodeDecodeError:
        return  # the environment has no other text
    _check_secret(url)
    scheme = url.partition(":")[0].lower()
    if scheme in SCHEMES:
        address = attempt(parse_address, url, refusals=(StoreRefusedError,))
        if not isinstance(address, Refused):
            shown = parse_address(address.url)
            same((shown.nodes, shown.database, shown.prefix), (address.nodes, address.database, address.prefix), url)
            same((shown.cluster, shown.tls), (address.cluster, address.tls), url)
    elif scheme == "sqlite":
        path = attempt(path_of, url, refusals=(StoreRefusedError,))
        same(isinstance(path, Refused) or (path.isprintable() and "\0" not in path), True, "a path")
    else:
        attempt(store_from_url, url, OPTIONS, refusals=(StoreRefusedError,))


def _check_secret(url: str) -> None:
    """No message quotes what stands before an @."""
    before, at, after = url.rpartition("@")
    scheme, _, secret = before.partition("://")
    try:
        parse_address(f"{scheme}://{SECRET}{secret}{at}{after}")
    except StoreRefusedError as error:
        same(SECRET in str(error), False, "whether the message has the password")
