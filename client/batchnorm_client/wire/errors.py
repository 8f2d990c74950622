"""The exceptions: one tree, with one exception per problem type (RFC 9457).

    BatchNormError
    ├── NoAnswer                            no response from the service (client only)
    │   ├── ConnectionFailed                it cannot be reached, the connection was lost, the client is closed
    │   └── TimedOut                        no response in time
    ├── UnexpectedAnswer                    an unspecified response, such as a proxy's page (client only)
    ├── StaleState                          a follower's state is too old (client only)
    ├── BufferFull                          a follower has observed too much that is not folded yet (client only)
    └── ProblemError                        the service responded with application/problem+json
        ├── RequestError                    4xx: the call changed nothing
        │   ├── MalformedBody               400 malformed-body
        │   ├── Unauthenticated             401 unauthenticated
        │   ├── Forbidden                   403 forbidden
        │   ├── NotFound                    404 not-found
        │   │   ├── LayerNotFound           404 layer-not-found
        │   │   └── VersionNotFound         404 version-not-found
        │   ├── MethodNotAllowed            405 method-not-allowed
        │   ├── NotAcceptable               406 not-acceptable
        │   ├── RequestTimeout              408 request-timeout
        │   ├── LayerExists                 409 layer-exists
        │   ├── TooManyLayers               409 too-many-layers
        │   ├── GroupClosed                 409 group-closed
        │   ├── PinExists                   409 pin-exists
        │   ├── TooManyPins                 409 too-many-pins
        │   ├── LayerPinned                 409 layer-pinned
        │   ├── VersionMismatch             412 version-mismatch
        │   ├── DigestMismatch              412 digest-mismatch
        │   ├── PayloadTooLarge             413 payload-too-large
        │   ├── UnsupportedMediaType        415 unsupported-media-type
        │   └── InvalidRequest              422 invalid-request
        │       ├── ShapeMismatch           422 shape-mismatch
        │       ├── DtypeMismatch           422 dtype-mismatch
        │       ├── TooFewValues            422 too-few-values
        │       ├── NonFinite               422 non-finite
        │       ├── IdempotencyKeyReused    422 idempotency-key-reused
        │       ├── GroupMismatch           422 group-mismatch
        │       └── DeviceUnavailable       422 device-unavailable
        └── ServiceError                    5xx
            ├── InternalError               500 internal-error
            ├── NotImplementedProblem       501 not-implemented
            ├── Overloaded                  503 overloaded
            ├── StoreUnavailable            503 store-unavailable
            └── GroupIncomplete             504 group-incomplete

The service raises these exceptions and writes them as problems; the client reads problems and raises the same
exceptions. So both sides share one list, and no problem can be left unmapped. A class's docstring is the text
that `GET /problems/<name>` returns.
"""

from __future__ import annotations

from typing import Any, ClassVar


class BatchNormError(Exception):
    """Base of everything that this package raises on purpose.

    Attributes:
        outcome_unknown: the client gave up, and the call may have taken effect nevertheless. False for a call that
            certainly changed nothing, and for calls that only read.
    """

    outcome_unknown: bool = False


class NoAnswer(BatchNormError):
    """There was no response. Its `__cause__` is the exception of the HTTP library.

    Attributes:
        permanent: another attempt would fail in the same way, such as with a certificate that is not trusted.
        proxy: the proxy that could not be reached, or did not connect to the service; None if the service failed.
    """

    def __init__(
        self, detail: str, *, outcome_unknown: bool = False, permanent: bool = False, proxy: str | None = None
    ) -> None:
        super().__init__(detail)
        self.outcome_unknown = outcome_unknown
        self.permanent = permanent
        self.proxy = proxy


class ConnectionFailed(NoAnswer):
    """The service cannot be reached, the connection was lost during the response, or the client is closed."""


class TimedOut(NoAnswer):
    """The service did not respond in time: within the client's timeout, or before the call's deadline."""


class UnexpectedAnswer(BatchNormError):
    """A response that is not specified: an error page of a proxy, another service, a newer problem type.

    Attributes:
        status: the HTTP status code.
        detail: what was unexpected.
        name: the problem type's name, if the response was a problem that this client does not know; else None.
        fields: the members of such a problem.
        request_id: the `X-Request-ID` of the response, if it had one.
        retry_after: seconds after which to try again, if the response had `Retry-After`.
    """

    def __init__(
        self,
        detail: str,
        status: int,
        *,
        name: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(detail, status)  # both, so that it can be pickled
        self.detail = detail
        self.status = status
        self.name = name
        self.request_id = request_id
        self.retry_after = retry_after
        self.fields = fields

    def __str__(self) -> str:
        return self.detail


class StaleState(BatchNormError):
    """The service has not confirmed for `max_staleness` seconds that a follower's state is the newest.

    Its `__cause__` is the exception of the last attempt to ask it, if that failed.
    """


class BufferFull(BatchNormError):
    """A follower has observed `max_unsent` batches that are not known to be folded. The batch was not counted."""


class ProblemError(BatchNormError):
    """A call that the service refused or could not carry out.

    Attributes:
        name: the problem type's name, the last part of its `type` URI.
        status: the HTTP status code.
        title: the problem type in a few words.
        detail: what was wrong this time.
        fields: members that a program can use, such as `field`, `expected` and `got`.
        request_id: the `X-Request-ID` of the response, once there is one.
        retry_after: seconds after which to try again (503 only).
    """

    name: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]

    def __init__(
        self, detail: str, *, request_id: str | None = None, retry_after: float | None = None, **fields: Any
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.request_id = request_id
        self.retry_after = retry_after
        self.fields = fields

    def __str__(self) -> str:
        return self.detail


class RequestError(ProblemError):
    """A 4xx: the caller has to change something. The call changed nothing."""


class ServiceError(ProblemError):
    """A 5xx: the service has a problem. The outcome may be unknown: repeat the call with the same key."""


class MalformedBody(RequestError):
    """The body is not what its Content-Type says: broken JSON, a .npy or safetensors file whose header lies, ..."""

    name, status, title = "malformed-body", 400, "The body cannot be read"


class Unauthenticated(RequestError):
    """The service asks for a token, or does not know the one that was sent. Send `Authorization: Bearer <token>`."""

    name, status, title = "unauthenticated", 401, "A token is needed"


class Forbidden(RequestError):
    """The token that was sent may not make this call: its scope is too small, or it is for layers of another prefix.

    The scope `read` allows calls that change nothing, `train` also creating layers, folding batches and setting
    tensors, `admin` every call. `expected` and `got` say what the call needs and what the token has.

    Without tokens: a web page of another site made a browser send a call that changes something.
    """

    name, status, title = "forbidden", 403, "This token may not do that"


class NotFound(RequestError):
    """There is nothing at this path. `/docs` lists every path."""

    name, status, title = "not-found", 404, "No such path"


class LayerNotFound(NotFound):
    """No layer has this name. Create it with `PUT /v1/layers/{name}`."""

    name, status, title = "layer-not-found", 404, "No such layer"


class VersionNotFound(NotFound):
    """The layer has no state of this version or tag any more: `GET /v1/layers/{name}/history` lists what is kept."""

    name, status, title = "version-not-found", 404, "This state is not kept"


class MethodNotAllowed(RequestError):
    """This path exists, but not with this method; the header `Allow` lists those that do."""

    name, status, title = "method-not-allowed", 405, "Method not allowed"


class NotAcceptable(RequestError):
    """The answer cannot be given in any form that `Accept` admits, such as .npy for a bfloat16 output."""

    name, status, title = "not-acceptable", 406, "No acceptable form of the answer"


class RequestTimeout(RequestError):
    """The request came too slowly: nothing for BATCHNORM_READ_TIMEOUT_SECONDS, or less than 1 KiB/s on average.

    The connection is closed. The same call can be sent again on another one.
    """

    name, status, title = "request-timeout", 408, "The request came too slowly"


class LayerExists(RequestError):
    """A layer with this name exists and was created with another config. Take another name, or delete it first.

    In Python, `convert_batchnorm` raises it for layers that were used before, too, unless it is told what to do then.
    """

    name, status, title = "layer-exists", 409, "The layer exists with another config"


class TooManyLayers(RequestError):
    """The store holds as many layers as the setting BATCHNORM_MAX_LAYERS allows. Delete some, or raise it."""

    name, status, title = "too-many-layers", 409, "Too many layers"


class GroupClosed(RequestError):
    """The group has all its members, or gave up waiting for them. Its id stays taken as long as receipts are kept."""

    name, status, title = "group-closed", 409, "The group is closed"


class PinExists(RequestError):
    """The tag stands for another state of the layer. Take another tag, or delete the pin first."""

    name, status, title = "pin-exists", 409, "The tag is in use"


class TooManyPins(RequestError):
    """The layer has as many pins as the setting BATCHNORM_MAX_PINS allows. Delete some, or raise it."""

    name, status, title = "too-many-pins", 409, "Too many pins"


class LayerPinned(RequestError):
    """The layer has pins, which DELETE would take along. Delete them first, or send `?pins=delete`."""

    name, status, title = "layer-pinned", 409, "The layer has pins"


class VersionMismatch(RequestError):
    """The layer's version is not the one in `If-Match`. Read the layer again, then decide again."""

    name, status, title = "version-mismatch", 412, "The layer has another version"


class DigestMismatch(RequestError):
    """The state that would be used is not the one that `expect` names, so nothing was computed."""

    name, status, title = "digest-mismatch", 412, "The state has another digest"


class PayloadTooLarge(RequestError):
    """The body is larger than the setting BATCHNORM_MAX_BODY_BYTES allows.

    Send smaller batches, raise it, or let the batch stay where it is: `train_local` of the Python client, and the call
    `moments`, send count, mean and variance instead.

    Or a batch has more elements than the setting BATCHNORM_MAX_ELEMENTS, a dimension of 0 counted as 1; where it has
    one, and the request or the answer is JSON, more than 1,048,576.

    Or the URL, or the headers and trailers, are more than BATCHNORM_MAX_URL_BYTES, BATCHNORM_MAX_HEADERS or
    BATCHNORM_MAX_HEADER_BYTES.
    """

    name, status, title = "payload-too-large", 413, "The body is too large"


class UnsupportedMediaType(RequestError):
    """The service does not read this Content-Type here; `expected` lists those that it reads."""

    name, status, title = "unsupported-media-type", 415, "Unsupported media type"


class InvalidRequest(RequestError):
    """A field, parameter, header, tensor or name is unknown, missing or out of range; `field` says which."""

    name, status, title = "invalid-request", 422, "A part of the request is not valid"


class ShapeMismatch(InvalidRequest):
    """A tensor's shape does not fit the layer: wrong rank, wrong number of channels, or ragged lists."""

    name, status, title = "shape-mismatch", 422, "The shape does not fit the layer"


class DtypeMismatch(InvalidRequest):
    """A tensor's dtype does not fit the layer: float16, bfloat16, float32 for float32; float64 for float64."""

    name, status, title = "dtype-mismatch", 422, "The dtype does not fit the layer"


class TooFewValues(InvalidRequest):
    """Batch statistics need more than one value per channel, and a batch that is not empty."""

    name, status, title = "too-few-values", 422, "Too few values per channel"


class NonFinite(InvalidRequest):
    """The batch has NaN or infinity, or its statistics, the folded state or the output overflow their dtype.

    A layer with `non_finite: "allow"` takes such batches as torch does.
    """

    name, status, title = "non-finite", 422, "Values that are not finite"


class IdempotencyKeyReused(InvalidRequest):
    """This Idempotency-Key was used for another batch. A key names one batch; make a new one for each."""

    name, status, title = "idempotency-key-reused", 422, "The key belongs to another batch"


class GroupMismatch(InvalidRequest):
    """The group was opened with another size. All its members must name the same."""

    name, status, title = "group-mismatch", 422, "The group has another size"


class DeviceUnavailable(InvalidRequest):
    """The layer's device is not there on this machine; `expected` lists those that are."""

    name, status, title = "device-unavailable", 422, "The device is not available"


class InternalError(ServiceError):
    """Something broke inside the service. Its log has the cause under the request id."""

    name, status, title = "internal-error", 500, "Internal error"


class NotImplementedProblem(ServiceError):
    """This version of the service does not have that yet."""

    name, status, title = "not-implemented", 501, "Not implemented"


class Overloaded(ServiceError):
    """Too many calls are waiting. Nothing was done; try again after the seconds in `Retry-After`."""

    name, status, title = "overloaded", 503, "Overloaded"


class StoreUnavailable(ServiceError):
    """The store does not answer. Whether the call took effect may be unknown: repeat it with the same key."""

    name, status, title = "store-unavailable", 503, "The store is unavailable"


class GroupIncomplete(ServiceError):
    """Not all members of the group came before its deadline. Nothing was folded; begin again with a new group id."""

    name, status, title = "group-incomplete", 504, "The group is incomplete"


def shown(text: str) -> str:
    """What a caller sent, for a message: quoted, escaped, and cut after 80 characters."""
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")


def _problems(base: type[ProblemError]) -> dict[str, type[ProblemError]]:
    """Every class below `base` that has a problem type of its own, by its name."""
    found: dict[str, type[ProblemError]] = {}
    for cls in base.__subclasses__():
        if "name" in vars(cls):
            found[cls.name] = cls
        found |= _problems(cls)
    return found


PROBLEMS: dict[str, type[ProblemError]] = _problems(ProblemError)
"""Every problem type, by its name."""
