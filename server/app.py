"""Trimtab as an endpoint plug-in of vLLM's own server application.

vLLM builds its application with all its routes, then hands it here: routes of the same path are
replaced, others are added, everything else is inherited.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import vllm
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.platforms import current_platform

from server import errors, keys
from server.engine import media, startup, wording
from server.engine.ending import on_shutdown
from server.engine.facts import counts_for_all
from server.engine.preludes import precede
from server.engine.prompts import inspect
from server.engine.reports import listen
from server.engine.tenants import separate
from server.engine.tracing import trace_calibration
from server.front_end import FrontEnd
from server.metrics import Metrics
from server.offer import offer
from server.openapi import describe
from server.routes import calibrators, generate, health, models, presets, profiles
from server.settings import Settings
from server.shell import enclose, free_paths, guard

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

ROUTES = (generate, models, calibrators, profiles, presets, health)


class TrimtabEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = "trimtab"
    required_tasks: Any = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Lay our routes over vLLM's."""
        self._app = app
        media.register()
        for module in ROUTES:
            app.include_router(module.router)
        guard(app, app.state.args, Settings.from_args(app.state.args))

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Check the workers and set up what the routes share; nothing listens yet.

        Raises:
            StartupRefused: calibration would not work in this configuration.
        """
        if engine_client is None or self._app is None:
            raise startup.StartupRefused("Trimtab needs an engine: it cannot run render-only")
        await startup.verify_workers(engine_client)
        settings = Settings.from_args(args)
        names = args.served_model_name or [args.model]
        front_end = build_front_end(engine_client, settings, names)
        state.trimtab = front_end
        precede(engine_client, front_end.preludes)
        wording.look_for(engine_client)
        inspect(engine_client, front_end.check_prompt)
        if len(keys.configured(args, settings)) > 1:
            # Outermost, so that a text pass has the salt of its prompt.
            separate(engine_client, front_end.tenant_salt)
        listen(engine_client, front_end.report)
        trace_calibration(engine_client, front_end.attributes)
        on_shutdown(engine_client, front_end.gate.close)
        handle_errors(self._app)
        describe(self._app, front_end.admission.calibrators.values(), free_paths(args, settings))
        enclose(self._app, args, settings)


def handle_errors(app: FastAPI) -> None:
    """Answer errors in our envelope.

    vLLM registers its own handlers after the routes, so ours come after that.
    """
    theirs = {error: _enveloped(handler) for error, handler in app.exception_handlers.items()}
    ours: dict[Any, Any] = {
        errors.ApiError: errors.handle_api_error,
        HTTPException: errors.handle_http_exception,
        RequestValidationError: errors.handle_validation_error,
        **dict.fromkeys(errors.BROKEN, errors.handle_unreadable),
    }
    app.exception_handlers.update({**theirs, **ours})


def _enveloped(handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def answer(request: Request, error: Exception) -> Response:
        response = handler(request, error)
        return errors.in_our_envelope(await response if isawaitable(response) else response)

    return answer


def build_front_end(
    engine_client: EngineClient, settings: Settings, names: Sequence[str]
) -> FrontEnd:
    """State of this process for one engine, whose model is served under `names`."""
    config = engine_client.vllm_config
    admission, aliases = offer(config, settings, names)
    metrics = Metrics(admission.calibrators, vllm.__version__, current_platform.device_type)
    if counts_for_all(config):
        metrics.profiles_loaded(len(admission.profiles))
    capacity = config.scheduler_config.max_num_seqs + settings.limits.max_queued_requests
    key = settings.salt_key.encode()
    return FrontEnd(admission, metrics, key, aliases, capacity=capacity)


def endpoint_plugin() -> TrimtabEndpoint:
    """Entry point of the group `vllm.endpoint_plugins`."""
    return TrimtabEndpoint()
