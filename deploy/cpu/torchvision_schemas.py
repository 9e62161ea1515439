"""Makes a torchvision built for CUDA importable beside the CPU build of torch.

Such a torchvision cannot load its extension module, so the operators ``torchvision::nms`` and
``torchvision::qnms`` are never declared, and ``import torchvision`` fails where it registers their
shape functions. Declaring the two schemas first is enough for everything in torchvision that is
written in Python, its image transforms among it; calling an operator still raises.

The installer copies this file to site-packages together with a ``.pth`` line that calls `install`,
because vLLM imports torchvision in several processes, in some of them before it loads plug-ins.
Until a process imports torchvision this costs one entry of ``sys.meta_path``, and no torch.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# A library drops its declarations when it is collected, so it has to live as long as the process.
_libraries: list[object] = []


class SchemaLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        define()
        super().exec_module(module)


class TorchvisionFinder:
    """Finds torchvision where it always is, with a loader that declares the operators first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = SchemaLoader(spec.loader.name, spec.loader.path)
        return spec


def define() -> None:
    if _libraries:
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(operator + SIGNATURE)
    _libraries.append(library)


def install() -> None:
    sys.meta_path.insert(0, TorchvisionFinder())
