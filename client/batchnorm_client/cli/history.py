"""Commands on a layer's kept states: history, rollback, pin, pins, unpin."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm_client.cli.output import (
    Json,
    console,
    history_table,
    pins_table,
    print_document,
    print_documents,
    print_json,
    say,
)
from batchnorm_client.cli.service import IfMatch, Name, Service, calling, size, with_service

Tag = Annotated[
    str,
    typer.Argument(metavar="TAG", help="Letters, digits, dots, underscores and hyphens; not only digits."),
]


@with_service
def history(
    name: Name,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many.", show_default=False)] = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """List the states of a layer that are kept, newest first."""
    with calling(service) as client:
        layer = client.layer(name)
        found, pins = list(layer.history(limit=limit)), [] if json else layer.pins()
    if json:
        print_documents(found)
    else:
        console().print(history_table(found, pins, console().width))


@with_service
def rollback(
    name: Name,
    to: Annotated[str, typer.Argument(metavar="VERSION|TAG", help="The state to go back to.", show_default=False)],
    if_match: IfMatch = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Go back to a kept state. The state before stays in the history, so a rollback can be undone."""
    with calling(service) as client:
        layer = client.layer(name).rollback(to, if_match=if_match)
    if json:
        print_document(layer)
    else:
        say(name, f"back to {to}; {size(layer)}")


@with_service
def pin(
    name: Name,
    tag: Tag,
    version: Annotated[
        int | None, typer.Option(metavar="VERSION", help="Of a kept state; the newest by default.", show_default=False)
    ] = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Keep a state of a layer under a tag, until unpin. Prints the digest, to be stored with the tag."""
    with calling(service) as client:
        made = client.layer(name).pin(tag, version=version)
    if json:
        print_document(made)
    else:
        say(name, f"version {made.version:,} pinned as {tag}, {made.digest}")


@with_service
def pins(name: Name, *, service: Service, json: Json = False) -> None:
    """List the pins of a layer, by tag."""
    with calling(service) as client:
        found = client.layer(name).pins()
    if json:
        print_documents(found)
    elif found:
        console().print(pins_table(found, console().width))
    else:
        typer.echo(f"{name} has no pins.")


@with_service
def unpin(name: Name, tag: Tag, *, service: Service, json: Json = False) -> None:
    """Delete a pin. Its state is then kept only as long as others are."""
    with calling(service) as client:
        client.layer(name).unpin(tag)
    if json:
        print_json({"name": name, "tag": tag, "deleted": True})
    else:
        say(name, f"pin {tag} deleted")
