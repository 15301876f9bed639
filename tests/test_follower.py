"""How a replica is brought to plans while it answers."""

import asyncio
import threading
from pathlib import Path

import pytest

from recsys.errors import BundleError
from serving.follower import Follower
from serving.lineup import BundlePlace, Plan

WAIT = 60.0


class Loads:
    """Loads one plan for each `go.release()`; refuses the versions it is told to."""

    def __init__(self, served: str, *refused: str) -> None:
        self.served = served
        self.tried: list[str] = []
        self.go = threading.Semaphore(0)
        self._refused = refused

    def __call__(self, plan: Plan) -> None:
        assert self.go.acquire(timeout=WAIT)
        self.tried.append(plan.champion.version)
        if plan.champion.version in self._refused:
            raise BundleError(f"{plan.champion.version} is damaged")
        self.served = plan.champion.version


def plan(version: str) -> Plan:
    return Plan(BundlePlace(Path("bundles"), version))


def test_who_answers_is_not_held_up_by_what_is_loaded_and_ends_at_the_last_plan():
    async def follow() -> None:
        load = Loads("a", "c")
        follower = Follower(load, lambda: load.served)
        for version in "bcd":  # Ray Serve sends no request before these return
            await asyncio.wait_for(follower.follow(plan(version)), WAIT)
        assert (load.tried, load.served) == ([], "a")
        load.go.release()
        load.go.release()
        while len(load.tried) < 2:
            await asyncio.sleep(0.001)
        assert (load.tried, load.served) == (["b", "c"], "b")  # what is refused leaves everything as it was
        load.go.release()
        await asyncio.wait_for(follower.idle(), WAIT)
        assert (load.tried, load.served) == (["b", "c", "d"], "d")

    asyncio.run(follow())


def test_the_first_plan_is_waited_for_and_its_refusal_told():
    async def follow() -> None:
        load = Loads("", "a")
        follower = Follower(load, lambda: load.served)
        first = asyncio.create_task(follower.follow(plan("a")))
        await asyncio.sleep(0)
        assert not first.done()
        load.go.release()
        with pytest.raises(BundleError, match="damaged"):
            await asyncio.wait_for(first, WAIT)
        load.go.release()
        await asyncio.wait_for(follower.follow(plan("b")), WAIT)
        assert load.served == "b"

    asyncio.run(follow())
