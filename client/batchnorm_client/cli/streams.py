"""Commands that send a memory-mapped file to a layer, batch by batch: train, eval."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

import numpy as np
import typer

from batchnorm_client.cli.data import Array, Batches, progress, written
from batchnorm_client.cli.output import Json, print_json, say
from batchnorm_client.cli.service import (
    PATIENT,
    REFUSED,
    USAGE,
    At,
    Expect,
    Name,
    Service,
    calling,
    count,
    fail,
    with_service,
)
from batchnorm_client.wire.documents import Layer
from batchnorm_client.wire.errors import (
    BatchNormError,
    DtypeMismatch,
    IdempotencyKeyReused,
    PayloadTooLarge,
    TooFewValues,
)

Size = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Samples in a batch.")]
Cast = Annotated[
    Literal["float16", "float32", "float64"] | None,
    typer.Option("--dtype", metavar="DTYPE", help="Convert each batch to float16, float32 or float64."),
]
Data = Annotated[Path, typer.Argument(metavar="IN.npy", help="Array of shape (N, C, ...); memory-mapped.")]


@with_service
def train(
    name: Name,
    data: Data,
    batch_size: Size = 256,
    dtype: Cast = None,
    drop_last: Annotated[
        bool, typer.Option("--drop-last", help="Omit the last batch if it is smaller.", show_default=False)
    ] = False,
    run_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Id of this run. A repeat with the same id, file and batch size counts no batch twice, as long as the "
            "service keeps receipts (an hour by default). By default a new id, which is printed if the run fails.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="OUT.npy", help="Write the normalized samples to this file.", show_default=False),
    ] = None,
    normalize: Annotated[
        Literal["batch", "running"],
        typer.Option(
            help="What --out is normalized with: each batch's own statistics, or the running ones right after it was "
            "folded, as observations are in reinforcement learning; batches that had counted before, with the newest."
        ),
    ] = "batch",
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Train a layer with a file, batch by batch and in order."""
    if normalize == "running" and out is None:
        raise typer.BadParameter("running is about --out, which is not given", param_hint="--normalize")
    run = run_id or uuid4().hex[:12]
    if not re.fullmatch("[!-~]{1,180}", run):  # it becomes part of a header
        raise typer.BadParameter("must be up to 180 characters of ASCII without spaces", param_hint="--run-id")
    batches = Batches(data, batch_size, dtype, whole=drop_last)
    if out is not None:
        _check_other_file(out, data)
    before = _look(name, service)
    since = time.perf_counter()
    counts = {"batches": 0, "replayed": 0, "version": before.version, "num_batches_tracked": before.num_batches_tracked}
    with (
        calling(service, PATIENT) as client,
        _explained(run, counts, len(batches)),
        _output(out, batches) as write,
        progress(name, len(batches)) as advance,
    ):
        layer = client.layer(name)
        for place, batch in batches:
            result = layer.train(batch, key=f"{run}:{place.start}", normalize=normalize)
            write(place, result.output)
            counts["batches"] += 1
            counts["replayed"] += result.replayed
            counts |= {"version": result.version, "num_batches_tracked": result.num_batches_tracked}
            advance(place.stop)
    seconds = round(time.perf_counter() - since, 3)
    if json:
        written_to = {} if out is None else {"file": str(out)}
        print_json({"name": name, "run_id": run, "samples": batches.rows, "seconds": seconds, **counts, **written_to})
        return
    again = f", {counts['replayed']:,} of which had counted before" if counts["replayed"] else ""
    told = f"{count(counts['batches'], 'batch')}{again} ({count(batches.rows, 'sample')}) in {seconds:.1f} s; "
    say(name, f"{told}now {count(counts['num_batches_tracked'], 'batch')}, version {counts['version']:,}")


def _check_other_file(out: Path, data: Path) -> None:
    if out.exists() and out.samefile(data):
        fail(f"{out} is the file that is read; give the output another name", USAGE)


@contextmanager
def _output(out: Path | None, batches: Batches) -> Iterator[Callable[[slice, Array], None]]:
    """A function that writes a batch's output to its place in a file, which is complete at the end; or does nothing."""
    if out is None:
        yield lambda _place, _output: None
        return
    with written(out) as part:
        target = np.lib.format.open_memmap(part, "w+", batches.dtype, (batches.rows, *batches.array.shape[1:]))

        def write(place: slice, output: Array) -> None:
            target[place] = output

        yield write
        target.flush()


@contextmanager
def _explained(run: str = "", counts: Mapping[str, int] | None = None, total: int = 0) -> Iterator[None]:
    """Add to a failure what to do about it, and to an interrupted train run how to continue."""
    try:
        yield
    except DtypeMismatch as error:
        error.add_note("--dtype converts each batch")
        raise
    except PayloadTooLarge as error:
        error.add_note("a smaller --batch-size sends less at once")
        raise
    except IdempotencyKeyReused:
        begun = f"run {run} was begun with another file or --batch-size"
        fail(f"{begun}; --run-id goes on with the same file and --batch-size only", REFUSED)
    except (BatchNormError, KeyboardInterrupt) as error:
        if counts is None:
            raise
        if isinstance(error, TooFewValues):
            error.add_note("--drop-last leaves out a last batch that is smaller")
        # When the first batch was refused, there is nothing to continue.
        if counts["batches"] or isinstance(error, KeyboardInterrupt) or error.outcome_unknown:
            done = f"{counts['batches']:,} of {count(total, 'batch')} done"
            error.add_note(f"{done}; --run-id {run} goes on and counts none twice")
        raise


def _look(name: str, service: Service, at: str | None = None, expect: str | None = None) -> Layer:
    """The layer before a long run; fails at once if it cannot be read."""
    with calling(service) as client:
        return client.layer(name, at=at, expect=expect).inspect()


@with_service
def evaluate(
    name: Name,
    data: Data,
    out: Annotated[Path, typer.Argument(metavar="OUT.npy", help="The output file; written when it is complete.")],
    batch_size: Size = 256,
    dtype: Cast = None,
    at: At = None,
    expect: Expect = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Normalize a file with a layer's running statistics, batch by batch, into another file."""
    batches = Batches(data, batch_size, dtype)
    _check_other_file(out, data)
    versions: list[int] = []
    _look(name, service, at, expect)
    with (
        calling(service, PATIENT) as client,
        _explained(),
        _output(out, batches) as write,
        progress(name, len(batches)) as advance,
    ):
        layer = client.layer(name, at=at, expect=expect)
        for place, batch in batches:
            result = layer.eval(batch)
            write(place, result.output)
            versions = [min([result.version, *versions]), max([result.version, *versions])]
            advance(place.stop)
    if json:
        shape = batches.array.shape
        print_json({"name": name, "file": str(out), "shape": shape, "dtype": batches.dtype.name, "versions": versions})
        return
    used = " to ".join(f"{version:,}" for version in dict.fromkeys(versions))
    say(
        name,
        f"{count(batches.rows, 'sample')} written to {out}" + (f", normalized with version {used}" if used else ""),
    )
    if len(set(versions)) > 1:
        typer.echo(
            "batchnorm: the layer was changed meanwhile; samples were normalized with different versions", err=True
        )
