"""The token file: read again when it changes, never half-written, and no token lost."""

import logging
import os
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchnorm_service.runtime import Runtime
from batchnorm_service.tokens import (
    Scope,
    TokenFile,
    TokenFileError,
    add_token,
    create_file,
    file,
    find_token,
    load_tokens,
    revoke_token,
)

SERVICE = 54321  # a user without a name


class Clock(Runtime):
    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "tokens"


def test_a_missing_file_is_made_with_one_admin_token(path):
    token = create_file(path)
    (stored,) = load_tokens(path).values()
    assert (stored.grant.scope, stored.grant.prefix) == (Scope.ADMIN, "")
    assert find_token(load_tokens(path), token.encode()) == stored
    assert create_file(path) is None
    assert load_tokens(path) == {stored.id: stored}


def test_it_is_readable_by_its_owner_only(path):
    create_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    add_token(path, Scope.READ, "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.fixture
def shared():
    """A token file of another user, in a directory that anybody may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, SERVICE, SERVICE)
        os.chmod(directory, 0o777)
        yield Path(directory) / "tokens"


@contextmanager
def as_user(number):
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_owner_of_the_directory_can_use_what_root_has_made(shared):
    """Seen: the service could not read a file that root's `token create` had made."""
    _, stored = add_token(shared, Scope.READ, "")
    with as_user(SERVICE):
        assert load_tokens(shared) == {stored.id: stored}
        add_token(shared, Scope.READ, "")
    revoke_token(shared, stored.id)
    with as_user(SERVICE):
        assert len(load_tokens(shared)) == 1


def test_a_file_that_another_user_owns_is_left_alone_and_the_message_says_whose_it_is(shared):
    """The owner could not read what another user has written."""
    with as_user(SERVICE):
        _, stored = add_token(shared, Scope.READ, "")
    lock = shared.with_name("tokens.lock")
    with as_user(SERVICE + 1):
        for call in (load_tokens, TokenFile, lambda path: add_token(path, Scope.ADMIN, "")):
            with pytest.raises(TokenFileError, match=rf"belongs to user {SERVICE} \(mode 0600\).* user {SERVICE + 1}$"):
                call(shared)
    lock.chmod(0o666)
    shared.chmod(0o666)
    with (
        as_user(SERVICE + 1),
        pytest.raises(TokenFileError, match=rf"belongs to user {SERVICE}, who could not read what"),
    ):
        add_token(shared, Scope.ADMIN, "")
    assert load_tokens(shared) == {stored.id: stored}


def test_a_running_service_says_why_it_cannot_read_the_file_again(shared, caplog):
    clock = Clock()
    with as_user(SERVICE):
        add_token(shared, Scope.READ, "")
        file = TokenFile(shared, clock)
        before = file.current()
    os.chown(shared, 0, 0)
    clock.time += 2
    with as_user(SERVICE):
        assert file.current() == before
    assert "it belongs to user root (mode 0600)" in caplog.text
    assert "stay valid" in caplog.text


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o644, 0), (0o620, 1), (0o602, 1)])
def test_who_can_write_it_can_make_tokens(path, mode, warnings, caplog):
    create_file(path)
    path.chmod(mode)
    load_tokens(path)
    assert [record.levelno for record in caplog.records] == warnings * [logging.WARNING]


def test_of_many_that_make_it_at_once_one_gets_the_token(path):
    with ThreadPoolExecutor(8) as pool:
        tokens = [token for token in pool.map(lambda _: create_file(path), range(16)) if token]
    assert len(tokens) == 1
    assert find_token(load_tokens(path), tokens[0].encode())


def test_tokens_that_are_made_at_once_are_all_kept(path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: add_token(path, Scope.READ, f"t{n}."), range(24)))
    assert load_tokens(path) == {stored.id: stored for _, stored in made}
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda each: revoke_token(path, each[1].id), made[::2]))
    assert set(load_tokens(path)) == {stored.id for _, stored in made[1::2]}
    assert sorted(each.name for each in path.parent.iterdir()) == ["tokens", "tokens.lock"]


def test_only_one_that_is_there_is_revoked(path):
    _, stored = add_token(path, Scope.READ, "")
    assert not revoke_token(path, "0" * 12)
    assert revoke_token(path, stored.id)
    assert not revoke_token(path, stored.id)
    assert load_tokens(path) == {}


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    create_file(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TokenFileError, match=r"tokens: No space left on device"):
        add_token(path, Scope.READ, "")
    assert path.read_bytes() == before
    assert sorted(each.name for each in path.parent.iterdir()) == ["tokens", "tokens.lock"]


def test_a_file_that_is_full_takes_no_more(path, monkeypatch):
    create_file(path)
    before = path.read_bytes()
    monkeypatch.setattr(file, "MAX_FILE_BYTES", len(before) + 10)
    with pytest.raises(TokenFileError, match="revoke tokens first"):
        add_token(path, Scope.READ, "")
    assert path.read_bytes() == before


def test_a_symbolic_link_is_kept(path, tmp_path):
    create_file(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    add_token(link, Scope.READ, "")
    assert link.is_symlink()
    assert len(load_tokens(path)) == len(load_tokens(link)) == 2


def test_a_damaged_file_is_never_overwritten(path):
    create_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()
    for change in (lambda: add_token(path, Scope.READ, ""), lambda: revoke_token(path, "0" * 12)):
        with pytest.raises(TokenFileError, match=rf"^{path}: line 2 "):
            change()
    assert path.read_bytes() == before


def test_what_is_no_file_is_refused(path, tmp_path):
    with pytest.raises(TokenFileError, match="No such file"):
        TokenFile(path)
    with pytest.raises(TokenFileError, match="Is a directory"):
        TokenFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # a blocking open would wait for a writer
    with pytest.raises(TokenFileError, match="not a regular file"):
        TokenFile(tmp_path / "pipe")


def test_changes_are_noticed_at_the_first_use_after_a_second(path, monkeypatch):
    create_file(path)
    clock = Clock()
    watched = TokenFile(path, clock)
    before = watched.current()
    _, stored = add_token(path, Scope.READ, "")
    clock.time += 0.9
    assert watched.current() is before
    clock.time += 0.1
    assert stored.id in watched.current()
    revoke_token(path, stored.id)
    clock.time += 1
    assert watched.current() == before
    looks, signature = [], file._signature
    monkeypatch.setattr(file, "_signature", lambda status: looks.append(1) or signature(status))
    same = watched.current()
    for _ in range(1000):  # ten seconds, a hundred uses in each
        clock.time += 0.01
        assert watched.current() is same
    assert len(looks) in {9, 10}


@pytest.mark.parametrize("way", ["damaged", "missing", "unreadable"])
def test_while_it_cannot_be_read_the_tokens_before_stay_valid(path, way, caplog):
    create_file(path)
    content = path.read_bytes()
    clock = Clock()
    watched = TokenFile(path, clock)
    before = watched.current()
    path.unlink()
    if way == "damaged":
        path.write_bytes(content + b"x\n")
    elif way == "unreadable":
        path.mkdir()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            clock.time += 1
            assert watched.current() is before
    (record,) = caplog.records  # not one for each check
    assert str(path) in record.getMessage()
    assert ("line 3" in record.getMessage()) == (way == "damaged")
    if way == "unreadable":
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(b"batchnorm-tokens 1\n")
    clock.time += 1
    assert watched.current() == {}


def test_a_change_of_content_alone_is_noticed(path):
    """Same name, same size, written in place: as an editor may."""
    create_file(path)
    clock = Clock()
    watched = TokenFile(path, clock)
    data = path.read_bytes()
    with path.open("r+b") as opened:
        opened.write(data.replace(b" admin ", b" train "))
    os.utime(path, ns=(0, 0))
    clock.time += 1
    (token,) = watched.current().values()
    assert token.grant.scope is Scope.TRAIN
