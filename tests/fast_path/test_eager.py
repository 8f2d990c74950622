"""A coroutine that is started where it is called behaves as one that a task runs."""

import asyncio
import contextvars

import pytest

from batchnorm_service.fast_path.eager import start

pytestmark = pytest.mark.anyio
variable = contextvars.ContextVar("variable", default="outside")


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    return "asyncio", {"use_uvloop": request.param}


def run(coroutine):
    return start(coroutine, asyncio.get_running_loop())


async def test_what_waits_for_nothing_is_done_at_once():
    async def inner():
        return 2

    async def outer():
        return 1 + await inner()

    assert run(outer()) == 3


async def test_what_waits_goes_on_as_a_task():
    future, steps = asyncio.get_running_loop().create_future(), []

    async def wait():
        steps.append("begun")
        steps.append(await future)
        await asyncio.sleep(0)
        steps.append(asyncio.current_task())
        return "done"

    task = run(wait())
    assert steps == ["begun"]
    future.set_result("heard")
    assert await task == "done"
    assert steps == ["begun", "heard", task]


async def test_what_is_done_before_the_task_runs_is_seen():
    future = asyncio.get_running_loop().create_future()

    async def wait():
        return await future

    task = run(wait())
    future.set_result(5)  # before the task's first step
    assert await task == 5


async def test_an_error_at_once_is_raised_at_once():
    async def fail():
        raise KeyError("now")

    with pytest.raises(KeyError, match="now"):
        run(fail())


async def test_errors_reach_the_coroutine_and_come_out_of_it():
    future = asyncio.get_running_loop().create_future()

    async def wait():
        try:
            await future
        except KeyError:
            await asyncio.sleep(0)
            raise ValueError("made of it") from None

    task = run(wait())
    future.set_exception(KeyError())
    with pytest.raises(ValueError, match="made of it"):
        await task


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_cancelling_reaches_the_coroutine_whenever_it_comes(turns):
    ended = []

    async def wait():
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(True)

    task = run(wait())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_a_coroutine_may_answer_when_it_is_cancelled():
    async def wait():
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            return "told"

    task = run(wait())
    task.cancel()
    assert await task == "told"


async def test_context_variables_stay_inside():
    async def change():
        variable.set("inside")
        await asyncio.sleep(0)
        return variable.get()

    task = run(change())
    assert variable.get() == "outside"
    assert await task == "inside"
