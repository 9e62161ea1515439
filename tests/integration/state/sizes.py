"""A plug-in that tells how much Trimtab's own objects hold, in all three processes.

Its source is installed by tests; only the names of its entry points are imported here. `GET /sizes`
exists on their server alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

OURS = ("server", "calibrators")
LEAVES = (str, bytes, int, float, type(None))

ENTRY_POINTS = """
[vllm.general_plugins]
sizes = sizes:register

[vllm.endpoint_plugins]
sizes = sizes:SizesEndpoint
"""


class Sizes:
    """Lengths of all that can be reached from `roots` through our objects, summed by path."""

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.found: Counter[str] = Counter()
        self._seen: set[int] = set()
        for path, root in roots.items():
            self._visit(path, root)

    def _visit(self, path: str, value: Any) -> None:
        if isinstance(value, LEAVES) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if callable(getattr(value, "cache_info", None)):
            self.found[path] += value.cache_info().currsize
        elif isinstance(getattr(value, "overloads", None), Mapping):
            # What numba has compiled.
            self.found[path] += len(value.overloads)
        elif isinstance(value, Collection) and not hasattr(value, "dtype"):
            self.found[path] += len(value)
            for each in list(value.values() if isinstance(value, Mapping) else value):
                self._visit(f"{path}[]", each)
        elif type(value).__module__.split(".")[0] in OURS:
            for name in attributes(value):
                self._visit(f"{path}.{name}", getattr(value, name, None))


def attributes(value: Any) -> Iterable[str]:
    """Names of what an object holds."""
    slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    return [*getattr(value, "__dict__", ()), *(name for each in slots for name in each)]


class Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_: ClassVar[Any] = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes that are allocated and not freed, in all arenas and in mappings of their own.

    Resident memory tells less: arenas and huge pages grow by megabytes that nobody holds.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    info = mallinfo2()
    total: int = info.uordblks + info.hblkhd
    return total


def sizes(roots: Mapping[str, Any]) -> dict[str, Any]:
    """Of `roots` and of our modules' globals; with the process they are in and what it holds."""
    gc.collect()
    memory = allocated()
    modules = {
        f"{name}:{variable}": value
        for name, module in sys.modules.items()
        if name.split(".")[0] in OURS
        for variable, value in vars(module).items()
        if not variable.startswith("__") and not isinstance(value, type)
    }
    tables = dict(Sizes({**modules, **roots}).found)
    return {"pid": os.getpid(), "allocated": memory, "tables": tables}


class SizesWorker:
    """vLLM mixes this into its worker (`--worker-extension-cls`)."""

    def sizes(self) -> dict[str, Any]:
        """Of what calibrates."""
        return sizes({"worker": self.calibration})  # type: ignore[attr-defined]


def register() -> None:
    """Have the engine core tell the sizes of its scheduler."""
    from vllm.v1.engine.core import EngineCore

    EngineCore.sizes = lambda self: sizes({"scheduler": self.scheduler})


class SizesEndpoint:
    """`GET /sizes`."""

    name = "sizes"
    required_tasks: Any = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the route."""

        @app.get("/sizes")
        async def show() -> dict[str, Any]:
            client = app.state.engine_client
            processor = client.output_processor
            front_end = {
                "front end": app.state.trimtab,
                "tasks": asyncio.all_tasks(),
                "requests": processor.request_states,
                "parents": processor.parent_requests,
                "ids": processor.external_req_ids,
            }
            (worker,) = await client.collective_rpc("sizes")
            engine = await client.engine_core.call_utility_async("sizes")
            return {"front end": sizes(front_end), "engine": engine, "worker": worker}

    async def init_state(self, *_: Any) -> None:
        """Nothing to set up."""
