"""Which route a request asks for, seen as the router sees it."""

from __future__ import annotations

from starlette._utils import get_route_path
from starlette.types import Scope

PROBES = frozenset({"/health", "/ready", "/version"})
OPEN_PATHS = PROBES | {"/metrics"}


def path_of(scope: Scope) -> str:
    """The path that routes are matched with, without the root path of a proxy.

    The router's own function: whatever is decided on another path, such as that of a URL put
    together from `Host`, can be led past the decision.
    """
    return get_route_path(scope)
