"""The stored form of tokens: whatever is in the file, it is read exactly or refused with its line."""

import hashlib
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm_service.tokens.grants import Grant, Scope
from batchnorm_service.tokens.stored import (
    MAX_FILE_BYTES,
    StoredToken,
    TokenFileError,
    find_token,
    format_tokens,
    new_token,
    parse_tokens,
)

LINE = "0123456789ab train team1. 2026-01-31T23:59:59Z " + "0f" * 16 + " " + "a5" * 32
FILE = f"batchnorm-tokens 1\n{LINE}\n"

prefixes = st.just("") | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", fullmatch=True)
stored_tokens = st.builds(
    StoredToken,
    st.text("0123456789abcdef", min_size=12, max_size=12),
    st.builds(Grant, st.sampled_from(Scope), prefixes),
    st.datetimes(datetime(1000, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)).map(
        lambda time: time.replace(microsecond=0)
    ),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=32, max_size=32),
)
files = st.lists(stored_tokens, max_size=5, unique_by=lambda token: token.id).map(format_tokens)


def test_a_line_says_what_it_says():
    (token,) = parse_tokens(FILE.encode()).values()
    assert (token.id, token.grant) == ("0123456789ab", Grant(Scope.TRAIN, "team1."))
    assert token.created == datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
    assert (token.salt, token.digest) == (b"\x0f" * 16, b"\xa5" * 32)


@given(st.lists(stored_tokens, max_size=5, unique_by=lambda token: token.id))
def test_what_is_written_reads_back(tokens):
    assert list(parse_tokens(format_tokens(tokens)).values()) == tokens


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode) | files)
def test_whatever_is_read_is_refused_or_written_the_same(data):
    check(data)


@given(files, st.data())
def test_a_damaged_file_is_refused_or_written_the_same(data, draws):
    """A byte changed, a piece left out or repeated: what is still accepted has no second reading."""
    start = draws.draw(st.integers(0, len(data)))
    end = draws.draw(st.integers(start, min(len(data), start + 200)))
    piece = draws.draw(st.binary(max_size=3) | st.just(data[start:end] * 2) | st.sampled_from([b"\n", b" ", b"\r\n"]))
    check(data[:start] + piece + data[end:])


def check(data):
    try:
        written = format_tokens(parse_tokens(data).values())
    except TokenFileError as error:
        refused = str(error)
    else:
        refused = ""
    assert re.match(r"line \d+ ", refused) if refused else written == data


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("\n", 1),
        ("batchnorm-tokens 2\n", 1),
        ("batchnorm-tokens 1", 1),
        (f"\ufeff{FILE}", 1),
        (FILE[:-1], 2),
        (FILE[:-10], 2),
        (f"{FILE}\n", 3),
        (f"{FILE}# a comment\n", 3),
        (f"{FILE}{LINE}\n", 3),
        (FILE.replace("\n", "\r\n"), 1),
        (FILE.replace("train", "write"), 2),
        (FILE.replace("train", "Train"), 2),
        (FILE.replace("team1.", ".team"), 2),
        (FILE.replace("team1.", "a" * 201), 2),
        (FILE.replace("team1.", "te/am"), 2),
        (FILE.replace(" team1.", ""), 2),
        (FILE.replace("2026-01-31", "2026-02-31"), 2),
        (FILE.replace("2026-01-31", "2026-1-31"), 2),
        (FILE.replace("0f0f", "0F0F", 1), 2),
        (FILE.replace("a5a5", "a5", 1), 2),
        (FILE.replace("train", "tra\u00efn"), 2),
        (FILE.replace("train ", "train\t"), 2),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(text, line):
    with pytest.raises(TokenFileError, match=rf"^line {line} "):
        parse_tokens(text.encode())


def test_a_file_that_is_too_large_is_refused():
    with pytest.raises(TokenFileError, match="larger"):
        parse_tokens(b" " * (MAX_FILE_BYTES + 1))


@pytest.mark.parametrize("scope", Scope)
def test_a_new_token_is_found_and_no_other(scope):
    token, stored = new_token(scope, "team1.")
    other, stored_other = new_token(scope)
    tokens = {each.id: each for each in (stored, stored_other)}
    assert find_token(tokens, token.encode()) is stored
    assert find_token(tokens, other.encode()) is stored_other
    last = "A" if token[-1] != "A" else "E"
    for wrong in (token[:-1], token[:-1] + last, token + "A", token.upper(), f" {token}", "", token[17:]):
        assert find_token(tokens, wrong.encode()) is None
    swapped = token.replace(stored.id, stored_other.id)
    assert find_token(tokens, swapped.encode()) is None
    assert find_token({}, token.encode()) is None


def test_a_token_has_256_random_bits_and_stores_only_a_salted_hash():
    token, stored = new_token(Scope.READ)
    again, stored_again = new_token(Scope.READ)
    assert len({token, again, stored.id, stored_again.id, stored.salt, stored_again.salt}) == 6
    assert len(token.rpartition(f"{stored.id}_")[2]) == 43  # 256 bits in base64
    written = format_tokens([stored]).decode()
    assert token not in written
    assert token.rpartition("_")[2] not in written
    assert stored.digest == hashlib.blake2b(token.encode(), salt=stored.salt, digest_size=32).digest()
    assert stored.digest.hex() not in repr(stored)


def test_unknown_ids_are_hashed_like_known_ones(monkeypatch):
    token, stored = new_token(Scope.READ)
    hashed = []
    monkeypatch.setattr(StoredToken, "matches", lambda self, presented: hashed.append(presented) or False)
    for tokens in ({}, {stored.id: stored}):
        assert find_token(tokens, token.encode()) is None
    assert hashed == [token.encode()] * 2


@pytest.mark.parametrize(
    ("bound", "asked", "visible"),
    [
        ("", "", ""),
        ("", "a", "a"),
        ("team1.", "", "team1."),
        ("team1.", "te", "team1."),
        ("team1.", "team1.", "team1."),
        ("team1.", "team1.bn", "team1.bn"),
        ("team1.", "team10", None),
        ("team1.", "team2.", None),
        ("team1.", "Team1.", None),
    ],
)
def test_a_prefix_within_a_prefix(bound, asked, visible):
    assert Grant(Scope.READ, bound).visible_prefix(asked) == visible


def test_a_prefix_is_text_and_no_pattern():
    grant = Grant(Scope.READ, "team1.")
    assert grant.sees("team1.bn")
    assert not any(map(grant.sees, ("team1", "team1x", "team10.bn", "xteam1.bn", "TEAM1.bn", "")))
