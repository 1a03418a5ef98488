"""Which tensors of a model hold one row for each of this rank's experts: all of them move when an expert moves.

SGLang's model classes name these tensors each in their own way (``routed_experts_weights_of_layer``), some not at all,
and none names what a backend derives from the weights and keeps beside them (transposed scales, for one). Here they are
found in the expert modules themselves, by what such a module is in SGLang: it has a ``layer_id`` and
``num_local_experts`` rows, of which the last ``num_fused_shared_experts`` are not the router's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from sglang_eplb_affinity.domain.errors import InputError

# Set by SGLang on parameters that keep a row for every expert of the model.
_GLOBAL = "_sglang_require_global_experts"
# The router's bias, which some modules keep beside the weights: a row for each logical expert.
_ROUTER = frozenset({"correction_bias"})
_DEPTH = 3  # of containers that an attribute is followed into


@dataclass(frozen=True)
class ExpertModule:
    """One layer's routed experts on this rank; looked up anew at every call: a model may rebind tensors."""

    layer: int
    module: torch.nn.Module
    local_slots: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, each [local slots, ...] and each memory once. Raises InputError for one that cannot move."""
        found: dict[str, torch.Tensor] = {}
        memory: list[tuple[int, int]] = []
        for name, tensor in self._rows():
            start, end = _memory(tensor)
            if any(low <= start and end <= high for low, high in memory):
                continue  # a view of what moves already
            if not isinstance(tensor, torch.nn.Parameter) and _is_index(tensor):
                raise InputError(
                    f"layer {self.layer}'s {type(self.module).__name__} keeps {name}, {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}, beside its weights, which would not be right after experts moved; "
                    "leave out EPLB, or use another MoE backend"
                )
            memory.append((start, end))
            found[name] = tensor.detach()[: self.local_slots]
        return found

    def _rows(self) -> Iterator[tuple[str, torch.Tensor]]:
        rows = int(self.module.num_local_experts)  # type: ignore[arg-type]
        parameters = list(self.module.named_parameters())
        others = [*self.module.named_buffers(), *_attributes(self.module)]
        for name, tensor in [*parameters, *others]:
            ours = tensor.dim() > 0 and tensor.shape[0] == rows and tensor.numel() > 0
            if ours and not getattr(tensor, _GLOBAL, False) and name not in _ROUTER:
                yield name, tensor


def expert_modules(model: torch.nn.Module) -> dict[int, ExpertModule]:
    """By layer, every module of routed experts whose experts are placed by the expert map."""
    found: dict[int, ExpertModule] = {}
    for name, module in model.named_modules():
        layer, rows = getattr(module, "layer_id", None), getattr(module, "num_local_experts", None)
        if not isinstance(layer, int) or not isinstance(rows, int) or not any(True for _ in module.parameters()):
            continue
        placed = getattr(module, "uses_expert_location", True) and not getattr(module, "is_shared_fused_moe", False)
        if not placed or (layer in found and found[layer].module is module):
            continue
        if layer in found:
            if any(module is inner for inner in found[layer].module.modules()):
                continue  # a part of the module that was found
            raise InputError(
                f"{type(model).__name__} has two modules of routed experts in layer {layer} (the second is {name}); "
                "EPLB moves one a layer: leave it out"
            )
        shared = int(getattr(module, "num_fused_shared_experts", 0) or 0)
        found[layer] = ExpertModule(layer, module, rows - shared)
    return found


def check_slots(model: torch.nn.Module, modules: Mapping[int, ExpertModule], local_slots: int, redundant: int) -> None:
    """Raise InputError unless the model made as many slots as the map has, in every layer with experts."""
    if not modules:
        raise InputError(f"{type(model).__name__} has no expert modules whose weights EPLB could move; leave EPLB out")
    for layer, found in modules.items():
        if found.local_slots != local_slots:
            raise InputError(
                f"--ep-num-redundant-experts {redundant}: {type(model).__name__} made {found.local_slots} slots a rank "
                f"in layer {layer} where the expert map has {local_slots}; this model class does not make redundant "
                "experts: use 0"
            )


def provide_weights(model: Any, modules: Mapping[int, ExpertModule]) -> None:
    """Give SGLang's own rebalance the tensors of ``modules`` under the name by which it asks the model for them.

    Raises InputError where the model class computes that name anew each time, from something else.
    """
    tensors = {layer: list(found.tensors().values()) for layer, found in modules.items()}
    present = getattr(model, "routed_experts_weights_of_layer", None)
    if present is None:
        model.routed_experts_weights_of_layer = tensors
        return
    known = getattr(present, "value", present)  # SGLang's LazyValue, or the dict itself
    known.clear()
    known.update(tensors)
    given = model.routed_experts_weights_of_layer
    if {layer: len(of_layer) for layer, of_layer in getattr(given, "value", given).items()} != {
        layer: len(of_layer) for layer, of_layer in tensors.items()
    }:
        raise InputError(
            f"{type(model).__name__} names other weights than its expert layers have, which EPLB cannot move"
        )


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the byte after the last."""
    elements = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _is_index(tensor: torch.Tensor) -> bool:
    """A list of numbers by slot, such as expert ids, rather than values that belong to an expert."""
    return tensor.dim() == 1 and not tensor.dtype.is_floating_point and bool((tensor != tensor[0]).any())


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors among the plain attributes of a module and its children, in containers and dataclasses too."""
    for prefix, inner in module.named_modules():
        for name, value in vars(inner).items():
            if not name.startswith(("_parameters", "_buffers", "_modules")):
                yield from _inside(f"{prefix}.{name}" if prefix else name, value, _DEPTH)


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth == 0 or isinstance(value, type):
        return
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _inside(f"{name}[{key!r}]", part, depth - 1)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _inside(f"{name}[{number}]", part, depth - 1)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _inside(f"{name}.{field.name}", getattr(value, field.name, None), depth - 1)
