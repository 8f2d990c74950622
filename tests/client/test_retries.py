"""When a call is sent again, and how long the client waits first: as a value, without a clock."""

import orjson
import pytest

from batchnorm_client import (
    ConnectionFailed,
    LayerNotFound,
    Overloaded,
    RequestTimeout,
    Retry,
    StoreUnavailable,
    TimedOut,
    UnexpectedAnswer,
)
from batchnorm_client.core import Attempts, Request, Response, calls
from batchnorm_client.wire.errors import PROBLEMS
from client.harness import StoppedClock

NEW = Request("POST", "/v1/layers/bn/train", lambda answer: answer.status)
READ = Request("GET", "/v1/layers/bn", lambda answer: answer.status, reads=True)
ONCE = Request("DELETE", "/v1/layers/bn", lambda answer: answer.status, repeat_if_unknown=False)


@pytest.fixture
def clock():
    return StoppedClock()


def cut():
    return ConnectionFailed("cut", outcome_unknown=True)


def refused():
    return ConnectionFailed("refused")


def gateway(status):
    return UnexpectedAnswer("a page", status=status)


def incomplete():
    return UnexpectedAnswer("too late", status=504, name="group-incomplete")


def test_waits_grow_to_the_longest(clock):
    attempts = Attempts(NEW, Retry(attempts=100, wait_initial=0.5, wait_max=4, deadline=None), clock)
    waits = [attempts.pause(cut()) for _ in range(99)]
    for wait, most in zip(waits, [0.5, 1, 2, 4, *[4] * 95], strict=True):
        assert most / 2 <= wait <= most
    assert len(set(waits[10:])) > 50
    with pytest.raises(ConnectionFailed) as raised:
        attempts.pause(cut())
    assert raised.value.__notes__ == ["after 100 tries"]


@pytest.mark.parametrize(
    "error", [cut, refused, lambda: TimedOut("slow"), *(lambda s=s: gateway(s) for s in (502, 503, 504))]
)
@pytest.mark.parametrize("request_", [NEW, READ])
def test_what_may_pass_is_tried_again(clock, request_, error):
    attempts = Attempts(request_, Retry(), clock)
    assert attempts.pause(error()) > 0
    assert attempts.request is request_


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(clock, name):
    error = PROBLEMS[name]("no")
    if error.status in (408, 502, 503, 504) and name != "group-incomplete":
        assert Attempts(NEW, Retry(), clock).pause(error) > 0
    else:
        with pytest.raises(type(error)):
            Attempts(NEW, Retry(), clock).pause(error)


@pytest.mark.parametrize("error", [lambda: gateway(500), lambda: gateway(429), lambda: gateway(200), incomplete])
def test_what_does_not_pass_is_raised(clock, error):
    with pytest.raises(UnexpectedAnswer) as raised:
        Attempts(READ, Retry(), clock).pause(error())
    assert not raised.value.outcome_unknown


def test_a_failure_that_is_permanent(clock):
    with pytest.raises(ConnectionFailed):
        Attempts(READ, Retry(), clock).pause(ConnectionFailed("no such certificate", permanent=True))


@pytest.mark.parametrize("error", [cut, lambda: StoreUnavailable("gone"), lambda: gateway(502)])
def test_what_may_have_taken_effect_is_not_repeated_where_that_matters(clock, error):
    with pytest.raises(type(error())) as raised:
        Attempts(ONCE, Retry(), clock).pause(error())
    assert raised.value.outcome_unknown


@pytest.mark.parametrize("error", [refused, lambda: Overloaded("full"), lambda: RequestTimeout("too slow")])
def test_what_was_not_begun_can_always_be_repeated(clock, error):
    attempts = Attempts(ONCE, Retry(attempts=3), clock)
    assert attempts.pause(error()) > 0
    assert attempts.pause(error()) > 0
    with pytest.raises(type(error())) as raised:
        attempts.pause(error())
    assert not raised.value.outcome_unknown


def test_an_unknown_outcome_stays_unknown(clock):
    """The last try certainly did nothing, but the first may have."""
    attempts = Attempts(NEW, Retry(attempts=2), clock)
    attempts.pause(cut())
    with pytest.raises(ConnectionFailed) as raised:
        attempts.pause(refused())
    assert raised.value.outcome_unknown


def test_reading_has_no_unknown_outcome(clock):
    with pytest.raises(ConnectionFailed) as raised:
        Attempts(READ, Retry(attempts=1), clock).pause(cut())
    assert not raised.value.outcome_unknown


def test_retry_after_is_respected(clock):
    wait = Attempts(NEW, Retry(wait_initial=1, wait_max=1), clock).pause(Overloaded("full", retry_after=7))
    assert 7.5 <= wait <= 8


def test_retry_after_beyond_the_deadline_is_not_waited_for(clock):
    with pytest.raises(Overloaded):
        Attempts(NEW, Retry(deadline=60), clock).pause(Overloaded("full", retry_after=60))


def test_the_deadline(clock):
    attempts = Attempts(NEW, Retry(deadline=10, wait_initial=1, wait_max=1), clock)
    assert attempts.remaining() == 10
    clock.seconds += 8
    assert attempts.remaining() == 2
    attempts.pause(cut())
    clock.seconds += 1.5
    with pytest.raises(ConnectionFailed):
        attempts.pause(cut())
    clock.seconds += 1
    with pytest.raises(TimedOut, match="deadline of 10 s"):
        attempts.remaining()


def test_no_deadline(clock):
    attempts = Attempts(NEW, Retry(deadline=None), clock)
    clock.seconds += 1e9
    assert attempts.remaining() == float("inf")
    assert attempts.pause(cut()) > 0


def test_a_follow_up_that_finds_nothing_is_the_end(clock):
    """A follow-up that raises the error it was made for must not be sent again because of that error."""
    first = cut()

    def find(_answer):
        raise first

    follow_up = Request("GET", "/", find, reads=True)
    attempts = Attempts(Request("DELETE", "/", lambda _: None, confirm=lambda _: follow_up), Retry(), clock)
    assert attempts.pause(first) == 0
    assert attempts.request is follow_up
    assert attempts.pause(refused()) > 0
    with pytest.raises(ConnectionFailed):
        attempts.receive(Response(200, {}, b""))
    with pytest.raises(ConnectionFailed) as raised:
        attempts.pause(first)
    assert raised.value is first
    assert first.outcome_unknown


def test_errors_are_read_before_results(clock):
    attempts = Attempts(READ, Retry(), clock)
    assert attempts.receive(Response(200, {}, b"")) == 200
    body = b'{"type": "/problems/layer-not-found", "detail": "none"}'
    with pytest.raises(LayerNotFound, match="none"):
        attempts.receive(Response(404, {"content-type": "application/problem+json"}, body))


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"deadline": 0}, {"wait_initial": -1}, {"wait_initial": 2, "wait_max": 1}]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="must be"):
        Retry(**wrong)


def test_what_is_tried_again_is_told(clock, caplog):
    """Before the second try and each one after it: what, why, and for how long; ten tries were silent for 17.5 s."""
    attempts = Attempts(NEW, Retry(attempts=3, deadline=60, wait_initial=1), clock)
    attempts.pause(cut())
    clock.seconds += 20
    attempts.pause(refused())
    with pytest.raises(ConnectionFailed):
        attempts.pause(refused())
    assert {(record.name, record.levelname) for record in caplog.records} == {("batchnorm_client", "WARNING")}
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("POST /v1/layers/bn/train: ConnectionFailed: cut; sending it again in ")
    assert first.endswith("(try 2 of 3, until the deadline in 60.0 s)")
    assert second.endswith("(try 3 of 3, until the deadline in 40.0 s)")


def test_what_is_tried_again_without_a_deadline_is_told(clock, caplog):
    Attempts(NEW, Retry(deadline=None), clock).pause(cut())
    assert caplog.messages[0].endswith("(try 2 of 10, no deadline)")


def test_a_first_try_that_is_answered_says_nothing(clock, caplog):
    Attempts(READ, Retry(), clock).receive(Response(200, {}, b""))
    assert not caplog.records


MANY = calls.fold_many({"a": (2, [0.0], [1.0]), "b": (2, [0.0], [1.0])}, key="k")[0]


def of_many(a, b):
    return Response(200, {"content-type": "application/json"}, orjson.dumps({"layers": {"a": a, "b": b}}))


def folded():
    return {"version": 2, "num_batches_tracked": 1}


def problem(name):
    return {"type": f"/problems/{name}", "detail": name}


@pytest.mark.parametrize(
    ("name", "unknown"),
    [("store-unavailable", True), ("internal-error", True), ("overloaded", False), ("too-few-values", False)],
)
def test_a_layer_of_many_whose_store_did_not_answer_may_have_been_folded(clock, name, unknown):
    """Found by simulation: `outcome_unknown` was False, and the batch was in the statistics."""
    results = Attempts(MANY, Retry(), clock).receive(of_many(problem(name), folded()))
    assert results["a"].outcome_unknown is unknown
    assert results["b"].version == 2


def test_a_layer_of_many_that_is_refused_after_a_cut_may_have_been_folded_before(clock):
    attempts = Attempts(MANY, Retry(), clock)
    attempts.pause(cut())
    assert attempts.receive(of_many(problem("layer-not-found"), folded()))["a"].outcome_unknown
