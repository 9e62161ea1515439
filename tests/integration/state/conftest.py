"""One server for all tests of what requests leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import plugins
from tests.integration.serving import Server, serving
from tests.integration.state.sizes import ENTRY_POINTS

# Small steps and few places, so that requests wait for tokens and for a place.
STEP = 64
FLAGS = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", str(STEP))
PLACES = 16
# All blocks of this cache have been in use after some dozens of requests; an untouched one takes
# no memory.
BLOCKS = 96


@pytest.fixture(scope="package")
def server(model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    source = (Path(__file__).parent / "sizes.py").read_text()
    env = plugins.install(folder, "sizes", source, ENTRY_POINTS) | {"VLLM_PLUGINS": "trimtab,sizes"}
    # Python's objects come from where everybody's bytes are counted.
    env["PYTHONMALLOC"] = "malloc"
    flags = (*FLAGS, "--max-num-seqs", str(PLACES), "--num-gpu-blocks-override", str(BLOCKS))
    extension = ("--worker-extension-cls", "sizes.SizesWorker")
    ids_and_load = ("--enable-request-id-headers", "--enable-server-load-tracking")
    with serving(folder / "log", *flags, *extension, *ids_and_load, env=env) as running:
        yield running
