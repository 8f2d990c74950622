"""Which state of a layer a handle reads: the newest one, or one that is kept; and the digest that it must have."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm_client.kernels.digest import DIGEST_PATTERN, DIGEST_RULE
from batchnorm_client.wire.errors import DigestMismatch, InvalidRequest, shown
from batchnorm_client.wire.names import check_state_name


@dataclass(frozen=True, slots=True)
class StateChoice:
    """A state of a layer.

    Attributes:
        at: its version in decimal, or the tag of a pin; None for the newest state.
        expect: the digest that it must have; None for any.
    """

    at: str | None = None
    expect: str | None = None

    @classmethod
    def of(cls, at: int | str | None, expect: str | None) -> StateChoice:
        """The choice in a caller's arguments.

        Raises:
            InvalidRequest: `at` is neither a version nor a tag, or `expect` is no digest.
        """
        if at is not None:
            at = str(at)
            check_state_name(at)
        if expect is not None and not DIGEST_PATTERN.fullmatch(expect):
            raise InvalidRequest(
                f"{shown(expect)} is no {DIGEST_RULE}",
                field="expect",
                expected=DIGEST_PATTERN.pattern,
                got=expect[:200],
            )
        return cls(at, expect)

    @property
    def read_only(self) -> bool:
        """Whether a handle with this choice refuses to change the layer."""
        return self.at is not None or self.expect is not None

    @property
    def is_constant(self) -> bool:
        """Whether the chosen state can never be another one. A tag alone may be given to another state."""
        return self.at is not None and self.expect is not None

    @property
    def arguments(self) -> str:
        """As in the call that made the handle; empty for the newest state."""
        given = (("at", self.at), ("expect", self.expect))
        return "".join(f", {name}={value!r}" for name, value in given if value is not None)

    def check_digest(self, name: str, digest: str) -> None:
        """Raise `DigestMismatch`, as the service does, if the state of layer `name` has another digest."""
        if self.expect not in (None, digest):
            state = "the newest state" if self.at is None else f"the state {self.at}"
            raise DigestMismatch(
                f"{state} of layer {name!r} has another digest", field="expect", expected=digest, got=self.expect
            )

    def check_writable(self, name: str, call: str) -> None:
        """Raise ValueError if `call` is not allowed, because it does not use the chosen state alone."""
        if self.read_only:
            raise ValueError(
                f"{call}: this handle of layer {name!r} was made with at= or expect=, so it only reads the state that "
                f"they name; client.layer({name!r}) makes one that can do everything"
            )


NEWEST = StateChoice()
