"""The residual stream on its way into decoder layers, shown to the running step's plan.

By forward pre-hooks. Without torch.compile they are there only in steps that need them. A compiled
model is traced once, before the first request, so its hooks are there from the start; what they
call is opaque to the compiler and returns at once where nobody asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import direct_register_custom_op

_library = torch.library.Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]


def enter_layer(hidden_states: Tensor, residual: Tensor | None, attention: str) -> None:
    """Show the plan what enters the layer that `attention` belongs to; by vLLM's name of it."""
    context = get_forward_context()
    if not isinstance(context.attn_metadata, dict):
        return
    plan = getattr(context.attn_metadata.get(attention), "calibration", None)
    if plan is not None:
        layer = context.no_compile_layers[attention].impl.layer_index
        plan.enter(layer, hidden_states, residual)


def _enter_nothing(hidden_states: Tensor, residual: Tensor | None, attention: str) -> None:
    """What the compiler sees."""


direct_register_custom_op(
    "enter_layer",
    enter_layer,
    # It changes nothing. Said so, the compiler runs it, and before the layer's norm.
    mutates_args=["hidden_states"],
    fake_impl=_enter_nothing,
    target_lib=_library,
)


class ResidualStream:
    """The decoder layers of a model, and the hooks on them.

    A layer that does not take `hidden_states` and `residual` as those of vLLM's Llama do is not
    followed, and whoever asks for it fails.

    Args:
        model: the loaded model.
        layers: layer indices by vLLM's names of the attention layers.
        compiled: the model will be traced, and hooks cannot be added later.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, int], *, compiled: bool) -> None:
        self._hooks: dict[int, tuple[nn.Module, Callable[..., None]]] = {}
        self._handles: list[RemovableHandle] = []
        self._compiled = compiled
        for path, module in model.named_modules():
            if isinstance(module, Attention) and module.layer_name in layers:
                layer = _decoder_layer(model, path)
                hook = None if layer is None else _hook(layer, module.layer_name)
                if layer is not None and hook is not None:
                    self._hooks[layers[module.layer_name]] = layer, hook
        if compiled:
            self._attach(self._hooks)

    def follow(self, layers: Iterable[int]) -> None:
        """Show what enters these layers, until told otherwise."""
        if not self._compiled:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._attach(layers)

    def _attach(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if layer in self._hooks:
                module, hook = self._hooks[layer]
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)


def _decoder_layer(model: nn.Module, path: str) -> nn.Module | None:
    """The innermost numbered module around an attention layer."""
    names = path.split(".")
    numbered = [index for index, name in enumerate(names) if name.isdigit()]
    return model.get_submodule(".".join(names[: numbered[-1] + 1])) if numbered else None


def _hook(layer: nn.Module, attention: str) -> Callable[..., None] | None:
    names = [*signature(layer.forward).parameters]
    if not {"hidden_states", "residual"} <= {*names}:
        return None
    places = names.index("hidden_states"), names.index("residual")
    return partial(_show, attention=attention, places=places)


def _show(
    module: nn.Module,  # noqa: ARG001 - torch's signature
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    attention: str,
    places: tuple[int, int],
) -> None:
    hidden, residual = places
    hidden_states = args[hidden] if hidden < len(args) else kwargs["hidden_states"]
    rest = args[residual] if residual < len(args) else kwargs.get("residual")
    torch.ops.trimtab.enter_layer(hidden_states, rest, attention)
