"""More requests than a server can take."""

from __future__ import annotations

import asyncio
import sys

import httpx
import pytest

from server.middleware.paths import OPEN_PATHS
from server.middleware.queue import QueueMiddleware


class Slow:
    """An application whose answers wait, and what was refused before it."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.refusals = 0
        self.going = asyncio.Event()
        self.broken = False
        self.app = QueueMiddleware(self.answer, lambda: self.capacity, self.refused)

    def refused(self):
        self.refusals += 1

    async def answer(self, scope, receive, send):
        if scope["path"] == "/slow":
            await self.going.wait()
        if self.broken:
            raise RuntimeError("broken")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def client(self):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize("capacity", [1, 3])
def test_the_excess_is_refused_and_the_rest_finishes(capacity):
    async def run():
        slow = Slow(capacity)
        async with slow.client() as client:
            jobs = [asyncio.create_task(client.post("/slow")) for _ in range(capacity + 2)]
            done, waiting = await asyncio.wait(jobs, timeout=1, return_when="FIRST_COMPLETED")
            while len(done) < 2:
                done, waiting = await asyncio.wait(jobs, timeout=0.05)
            slow.going.set()
            return slow, [job.result() for job in done], await asyncio.gather(*waiting)

    slow, refused, answered = asyncio.run(run())
    assert (len(refused), slow.refusals, len(answered)) == (2, 2, capacity)
    assert {r.status_code for r in answered} == {200}
    for response in refused:
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
        assert response.json()["error"]["code"] == "overloaded"


def test_room_is_given_back_whatever_happens():
    async def run():
        slow = Slow(1)
        async with slow.client() as client:
            codes = [(await client.post("/x")).status_code]
            slow.broken = True
            codes.append((await client.post("/x")).status_code)
            slow.broken = False
            job = asyncio.create_task(client.post("/slow"))
            await asyncio.sleep(0.01)
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
            return [*codes, (await client.post("/x")).status_code]

    assert asyncio.run(run()) == [200, 500, 200]


def test_probes_and_looks_are_free():
    async def run():
        slow = Slow(0)
        async with slow.client() as client:
            looks = [await client.get(path) for path in (*OPEN_PATHS, "/v1/models")]
            posts = [await client.post(path) for path in OPEN_PATHS]
            return looks + posts, await client.post("/x")

    free, counted = asyncio.run(run())
    assert {r.status_code for r in free} == {200}
    assert counted.status_code == 503


def test_without_a_limit_nothing_is_refused():
    async def run():
        async with Slow(sys.maxsize).client() as client:
            return await asyncio.gather(*(client.post("/x") for _ in range(50)))

    assert {r.status_code for r in asyncio.run(run())} == {200}
