"""Eval of 8 KiB, against other model servers."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.bodies import KIB, batch, call, safetensors
from benchmarks.figures import Row, Target, in_turns, ratio
from benchmarks.load import Call
from benchmarks.peers.environments import PEERS


def peers(bench: Bench) -> Iterator[Row]:
    """Each that installs and starts."""
    if not bench.pace.peers:
        return
    ours = Call(bench.service.port, [call(bench.layer("bench"), "eval", safetensors(8 * KIB))])
    for peer in PEERS:
        problem = peer.install()
        if problem is not None:
            print(f"{peer.name} left out, it does not install: {problem}", file=sys.stderr)
            continue
        try:
            server = peer.start()
        except (OSError, RuntimeError) as error:
            print(f"{peer.name} left out, it does not start: {error}", file=sys.stderr)
            continue
        try:
            theirs = Call(server.port, [peer.request(batch(8 * KIB).tobytes())])
            bench.warm(ours, theirs)
            pairs = in_turns(bench.pace.rounds, lambda: bench.rate(ours), lambda theirs=theirs: bench.rate(theirs))
        finally:
            server.stop()
        yield ratio(f"eval 8 KiB, against {peer.requirement}", Target(5), pairs)
