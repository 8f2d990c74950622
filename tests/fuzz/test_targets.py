"""Fuzzing in short: every input that is kept, and a few hundred random changes; and that faults would be found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from batchnorm_client.wire.errors import ProblemError
from batchnorm_client.wire.tensors import json_writer, npy, regular_json, safetensors
from batchnorm_service.fast_path.cycle import FastPathCycle
from batchnorm_service.layers import records
from batchnorm_service.open_inference import codec
from batchnorm_service.rest import documents, many, negotiation
from batchnorm_service.store.valkey import address
from batchnorm_service.tokens import stored
from fuzz import limits, run, unguided
from fuzz.limits import TooMuchMemoryError, limited
from fuzz.mutate import mutated
from fuzz.promises import BrokenPromiseError
from fuzz.stored import SECRET
from fuzz.targets import TARGETS, Target, inputs

CHANGES = dict.fromkeys(TARGETS, 300) | {"http": 120}


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_is_mended(name: str) -> None:
    kept = [*inputs(name)]
    assert kept
    for data in kept:
        limited(TARGETS[name].promise)(data)


@pytest.mark.parametrize("name", TARGETS)
def test_changes_keep_the_promise(name: str) -> None:
    random, kept = Random(name), [*inputs(name)]
    for _ in range(CHANGES[name]):
        data = mutated(random, kept, TARGETS[name].longest)
        try:
            TARGETS[name].promise(data)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error


def test_the_command_knows_every_target() -> None:
    assert tuple(TARGETS) == run.NAMES


def _instead(module: Any, name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, name, make(getattr(module, name)))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "json": _instead(regular_json, "rounded", lambda rounded: lambda flat, dtype: rounded(flat + 1, dtype)),
    "npy": _instead(npy, "view_tensor", lambda view: lambda dtype, shape, data: view(dtype, shape[::-1], data)),
    "safetensors": _instead(safetensors, "_METADATA", lambda _: "metadata"),
    "written": _instead(json_writer, "NON_FINITE", lambda names: dict(reversed(names.items()))),
    "documents": _instead(documents, "split_vectors", lambda split: lambda *text: (split(*text)[0], {})),
    "moments": _instead(many, "_layers", lambda read: lambda *text: dict.fromkeys(read(*text) or {}, 0)),
    "inference": _instead(codec, "view_tensor", lambda view: lambda dtype, shape, data: view(dtype, shape[::-1], data)),
    "heads": _instead(negotiation, "_accepted", lambda accepted: lambda *text: (*accepted(*text), "text/html")),
    "records": _instead(records, "UNREADABLE", lambda _: LookupError),
    "urls": _instead(address, "_FORM", lambda _: SECRET),
    "tokens": _instead(stored, "Grant", lambda grant: lambda scope, prefix: grant(scope, prefix[:-1])),
    "http": _instead(FastPathCycle, "_receive_part", lambda receive: lambda cycle, part: receive(cycle, part[1:])),
}
"""For each target, a fault of what it tests."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    random, kept = Random(1), [*inputs(name)]
    changed = (mutated(random, kept, TARGETS[name].longest) for _ in range(300))
    with pytest.raises((BrokenPromiseError, ProblemError)):
        _all(TARGETS[name], [*kept, *changed])


def _all(target: Target, several: Iterable[bytes]) -> None:
    for data in several:
        target.promise(data)


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what is found of the only target, `planted`."""
    for kind in ("corpus", "faults"):
        (tmp_path / kind / "planted").mkdir(parents=True)
    monkeypatch.setattr(unguided, "inputs", lambda _: iter([b"a good one"]))
    return tmp_path


def _plant(monkeypatch: pytest.MonkeyPatch, promise: Callable[[bytes], None]) -> None:
    monkeypatch.setitem(TARGETS, "planted", Target(promise, list))


def test_a_crash_is_kept(found: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def crash(data: bytes) -> None:
        if data != b"a good one":
            raise KeyError("a planted fault")

    _plant(monkeypatch, crash)
    assert unguided.fuzz("planted", 60, found, Random(0)) == 1
    (fault,) = (found / "faults" / "planted").iterdir()
    assert fault.name == f"crash-{limits.file_name(fault.read_bytes())}"
    told = capsys.readouterr()
    assert "a planted fault" in told.err
    assert "number_of_executed_units: 2" in told.out
    with pytest.raises(KeyError):
        limited(crash)(fault.read_bytes())


def test_a_hang_is_ended_and_kept(found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unguided, "SECONDS", 0.05)
    _plant(monkeypatch, lambda _: time.sleep(60))
    assert unguided.fuzz("planted", 60, found, Random(0)) == 1
    assert [path.name[:8] for path in (found / "faults" / "planted").iterdir()] == ["timeout-"]


def test_an_input_that_takes_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "peak", iter([100, 100 + limits.GROWTH, 100, 101 + limits.GROWTH]).__next__)
    limited(len)(b"enough")
    with pytest.raises(TooMuchMemoryError, match="6 bytes raised the memory by 257 MiB"):
        limited(len)(b"a lot!")


def test_a_promise_kept_is_status_0(found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []
    _plant(monkeypatch, tried.append)
    assert unguided.fuzz("planted", 0.05, found, Random(0)) == 0
    assert tried[0] == b"a good one"
    assert list((found / "faults" / "planted").iterdir()) == []


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_target_and_how_to_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.fuzz(["urls"], 0.01, guided=False, found=tmp_path) == 0
    first, line, last = capsys.readouterr().out.splitlines()
    assert first.startswith("atheris is not installed")
    assert (line.split()[0], int(line.split()[1]) > 0) == ("urls", True)
    assert last == "1 targets, 0 faults"
    fault = tmp_path / "faults" / "npy" / "crash-0"
    outcome = run.Outcome("npy", 7, 100, 0, 250, [fault], "Traceback\nKeyError")
    monkeypatch.setattr(run, "_fuzz_one", lambda *_: outcome)
    assert run.fuzz(["npy"], 0.01, guided=True, found=tmp_path) == 1
    assert f"crash: make fuzz TARGET=npy INPUT={fault}" in capsys.readouterr().out
