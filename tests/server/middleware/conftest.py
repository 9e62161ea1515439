"""The smallest application around one middleware."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from server.middleware.keys import CURRENT


@pytest.fixture
def make_client():
    """A client of an application wrapped in one middleware; `more` are further routes."""

    def make(middleware, *args, more=(), **options):
        async def echo(request):
            body = await request.body()
            return JSONResponse(
                {
                    "length": len(body),
                    "headers": [[n.decode(), v.decode("latin-1")] for n, v in request.headers.raw],
                    "tenant": request.scope.get("trimtab.tenant"),
                    "current": CURRENT.get(),
                }
            )

        async def unread(request):
            return PlainTextResponse("unread")

        routes = [
            *more,
            Route("/unread", unread, methods=["GET", "POST"]),
            Route("/{path:path}", echo, methods=["GET", "POST", "PUT", "OPTIONS"]),
        ]
        wrapped = middleware(Starlette(routes=routes), *args, **options)
        return TestClient(wrapped, raise_server_exceptions=False)

    return make
