"""Random changes of inputs: for the tests, and for fuzzing where atheris is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

TOKENS = (
    *(
        b"{}",
        b"[]",
        b"[[",
        b"]]",
        b",",
        b":",
        b'"',
        b"null",
        b"true",
        b"NaN",
        b'"NaN"',
        b'"-Infinity"',
        b"1e400",
        b"-0.0",
    ),
    *(
        b"1e-7",
        b"9223372036854775808",
        b"18446744073709551616",
        b"0.1",
        b"\\u0000",
        b'"input"',
        b'"grad_output"',
        b'"count"',
    ),
    *(b'"mean"', b'"var"', b'"layers"', b'"weight"', b'"bias"', b'"num_features"', b'"channel_axis"', b'"statistics"'),
    *(
        b"\x93NUMPY",
        b"\x01\x00",
        b"\x03\x00",
        b"'descr'",
        b"'<f4'",
        b"'fortran_order'",
        b"'shape'",
        b"True",
        b"()",
        b"(1,)",
    ),
    *(b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"BF16"', b'"F4"', b'"I64"'),
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"\xff\xff",
        b"POST ",
        b"PUT ",
        b"GET ",
        b"HEAD ",
        b"DELETE ",
        b"PATCH ",
        b"CONNECT ",
        b" HTTP/1.1",
    ),
    *(
        b"/v1/layers/bn",
        b"/train",
        b"/eval",
        b"/moments",
        b"?",
        b"&",
        b"=",
        b"%2F",
        b"%",
        b"statistics=true",
        b"group=g&size=2",
    ),
    *(
        b"Content-Length: *\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(b"Upgrade: h2c\r\nConnection: Upgrade\r\n", b"Idempotency-Key: k\r\n", b'If-Match: "1"\r\n', b"Accept: */*\r\n"),
    *(
        b"application/json",
        b"application/x-npy",
        b"application/vnd.safetensors",
        b";q=0.5",
        b"0\r\n\r\n",
        b"Bearer all",
    ),
    *(
        b"valkey://",
        b"redis+cluster://",
        b"sqlite:///",
        b"memory:",
        b"@",
        b"?prefix=",
        b"?ca=/",
        b"[::1]",
        b":6379",
        b"/0",
    ),
)
"""Words of the formats, which random bytes seldom make. The same are a dictionary for atheris."""

_EDGES = (0, 1, 2, 7, 127, 128, 255, 65535, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)


def mutated(random: Random, corpus: Sequence[bytes], longest: int) -> bytes:
    """One of the inputs, changed in one place, or in up to six."""
    data = bytearray(random.choice(corpus))
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        _change(random, data, corpus)
    return bytes(data[:longest]) or b"\0"


def _change(random: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    at = random.randint(0, len(data))
    end = min(len(data), at + random.choice((1, 2, 4, 8, 32)))
    match random.randrange(8):
        case 0 if data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        case 1:
            data[at:at] = random.randbytes(random.randint(1, 4))
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = data[at:end] * random.randint(1, 3)
        case 4:
            data[at:at] = random.choice(TOKENS)
        case 5:
            data[at:end] = random.choice(TOKENS)
        case 6:
            data[at : at + 8] = random.choice(_EDGES).to_bytes(8, "little")[: max(1, end - at)]
        case _:
            other = random.choice(corpus)
            begin = random.randint(0, len(other))
            data[at:end] = other[begin : begin + random.randint(1, 64)]
