"""What lies between a connection and the routes: all middleware, in order.

Outside of everything, vLLM's own middleware and its last handler of exceptions included: request
id, log, envelope, and the limits of headers and body. Inside, next to the routes, so that vLLM's
metrics see the refusals: keys, drain, queue, the time a request may take, and the checks of
bodies.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Set
from functools import partial
from typing import Any

from fastapi import FastAPI
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.middleware import Middleware
from starlette.types import ASGIApp
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware

from server import bounds, keys, protocol
from server.middleware.body_limit import BodyLimitMiddleware
from server.middleware.drain import DrainMiddleware
from server.middleware.envelope import EnvelopeMiddleware
from server.middleware.header_limit import HeaderLimitMiddleware
from server.middleware.keys import KeyMiddleware
from server.middleware.paths import OPEN_PATHS, PROBES
from server.middleware.plain_routes import PlainRoutesMiddleware
from server.middleware.queue import QueueMiddleware
from server.middleware.request_bounds import RequestBoundsMiddleware
from server.middleware.request_id import RequestIdMiddleware
from server.middleware.request_log import RequestLogMiddleware
from server.middleware.time_limit import TimeLimitMiddleware
from server.routes import generate
from server.settings import Settings
from server.trust import Trust

# vLLM's check of keys leaves routes and methods out, and ours asks for the same keys.
REPLACED = (AuthenticationMiddleware, XRequestIdMiddleware)


def guard(app: FastAPI, args: Namespace, settings: Settings) -> None:
    """Add what comes directly before the routes, and choose the HTTP protocol."""
    state, limits = app.state, settings.limits
    checks = (partial(bounds.check, limits=limits), Trust.from_args(args, settings).check)
    if known := keys.configured(args, settings):
        free = _open(settings)
        app.user_middleware.append(Middleware(KeyMiddleware, keys=known, open_paths=free))
    app.user_middleware += [
        Middleware(DrainMiddleware, gate=lambda: state.trimtab.gate),
        Middleware(
            QueueMiddleware,
            capacity=lambda: state.trimtab.capacity,
            refused=lambda: state.trimtab.metrics.overloaded(),
        ),
        Middleware(TimeLimitMiddleware, seconds=limits.request_timeout),
        Middleware(RequestBoundsMiddleware, checks=checks),
        Middleware(PlainRoutesMiddleware, calibrated=generate.PATHS),
    ]
    protocol.select(limits)


def free_paths(args: Namespace, settings: Settings) -> Set[str] | None:
    """Paths that need no key, None where no path needs one."""
    return _open(settings) if keys.configured(args, settings) else None


def _open(settings: Settings) -> Set[str]:
    return OPEN_PATHS if settings.metrics_without_key else PROBES


def enclose(app: FastAPI, args: Namespace, settings: Settings) -> None:
    """Build the stack anew, after vLLM, without what ours replaces, and wrap it."""
    app.user_middleware = [
        _counting_on(app, each) for each in app.user_middleware if each.cls not in REPLACED
    ]
    stack: ASGIApp = app.build_middleware_stack()
    stack = BodyLimitMiddleware(stack, settings.limits.max_body_bytes)
    stack = HeaderLimitMiddleware(
        stack, args.h11_max_incomplete_event_size, args.h11_max_header_count
    )
    stack = EnvelopeMiddleware(stack, PROBES)
    if settings.request_log:
        stack = RequestLogMiddleware(stack)
    app.middleware_stack = RequestIdMiddleware(stack)


def _counting_on(app: FastAPI, middleware: Middleware) -> Middleware:
    """The same; if it counts requests, with the counters it has where vLLM built the stack.

    A second set cannot be registered, and without counters it would silently count nothing.
    """
    kind: Any = middleware.cls
    if kind != PrometheusInstrumentatorMiddleware:
        return middleware
    layer: Any = app.middleware_stack
    while layer is not None and not isinstance(layer, PrometheusInstrumentatorMiddleware):
        layer = getattr(layer, "app", None)
    if layer is None:
        return middleware
    options: Any = {**middleware.kwargs, "instrumentations": layer.instrumentations}
    return Middleware(kind, *middleware.args, **options)
