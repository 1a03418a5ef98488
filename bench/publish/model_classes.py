"""What EPLB can do with each model class of an SGLang, read from the source of its classes; nothing is imported.

A server moves experts of a class if the class says how many it has (``get_model_config_for_expert_location``), makes
its experts with SGLang's fused layer (which loads, finds and maps them by layer), and, for redundant experts, adds
``ep_num_redundant_experts`` to the number it makes. All else is refused at start-up.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError

_PLACED = "get_model_config_for_expert_location"
_DRAFT = re.compile(r"NextN|MTP|Eagle|EAGLE|Draft|DSpark|DFlash")
_LAYER = re.compile(r"(Fused|EP|DeepEP)MoE")


@dataclass(frozen=True)
class ModelClass:
    """``redundant``: it makes redundant experts. ``refusal``: why EPLB does not start with it, or ""."""

    architecture: str
    file: str
    redundant: bool
    refusal: str


@dataclass(frozen=True)
class _Class:
    name: str
    file: str
    node: ast.ClassDef

    @cached_property
    def names(self) -> set[str]:
        return {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)}

    @cached_property
    def defines(self) -> set[str]:
        return {node.name for node in self.node.body if isinstance(node, ast.FunctionDef)}

    @cached_property
    def expert_counts(self) -> list[str]:
        """The source of ``num_experts`` of every fused layer that the class makes."""
        found = []
        for node in ast.walk(self.node):
            if isinstance(node, ast.Call) and _makes_experts(node.func):
                value = next((word.value for word in node.keywords if word.arg == "num_experts"), None)
                found.append(self._resolved(value) if value is not None else "")
        return found

    @cached_property
    def asserts_none(self) -> bool:
        """It asserts that there are no redundant experts."""
        tests = [ast.unparse(node.test) for node in ast.walk(self.node) if isinstance(node, ast.Assert)]
        return any("ep_num_redundant_experts == 0" in test for test in tests)

    @cached_property
    def has_zero_experts(self) -> bool:
        return "zero_expert_num" in ast.unparse(self.node)

    def _resolved(self, value: ast.expr) -> str:
        """The expression, with what the class assigns to the name that it may be."""
        text = ast.unparse(value)
        if not isinstance(value, ast.Name | ast.Attribute):
            return text
        assigned = [
            ast.unparse(node.value)
            for node in ast.walk(self.node)
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == text for target in node.targets)
        ]
        return " ".join([text, *assigned])


def model_classes(sglang: Path) -> list[ModelClass]:
    """Every class with experts that SGLang's registry would find in ``sglang``/srt/models, draft models left out."""
    sources = sorted((sglang / "srt" / "models").glob("*.py"))
    if not sources:
        raise InputError(f"{sglang}: has no srt/models; is it an SGLang package?")
    modules = {path.stem: ast.parse(path.read_text(encoding="utf-8-sig")) for path in sources}
    known = {stem: _scope(stem, tree, modules) for stem, tree in modules.items()}
    found: dict[str, ModelClass] = {}
    for stem, tree in modules.items():
        for name in _entries(tree):
            entry = known[stem].get(name)
            if entry is not None and not _DRAFT.search(name):
                judged = _judge(entry, known)
                if judged is not None:
                    found[name] = judged
    return [found[name] for name in sorted(found, key=str.lower)]


def _scope(stem: str, tree: ast.Module, modules: dict[str, ast.Module]) -> dict[str, _Class]:
    """Classes of a module by the names that it knows them by: its own, and those of other model files."""
    scope = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.srt.models."):
            of_module = (node.module or "").removeprefix("sglang.srt.models.")
            for alias in node.names:
                other = _class_in(modules.get(of_module), alias.name)
                if other is not None:
                    scope[alias.asname or alias.name] = _Class(alias.name, of_module, other)
    own = {node.name: _Class(node.name, stem, node) for node in tree.body if isinstance(node, ast.ClassDef)}
    return scope | own


def _class_in(tree: ast.Module | None, name: str) -> ast.ClassDef | None:
    nodes = tree.body if tree is not None else []
    return next((node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)


def _entries(tree: ast.Module) -> list[str]:
    """Names in ``EntryClass = ...``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "EntryClass" for target in node.targets):
            return [name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)]
    return []


def _makes_experts(function: ast.expr) -> bool:
    if isinstance(function, ast.Call):  # get_moe_impl_class(quant_config)(...)
        return ast.unparse(function.func).endswith("get_moe_impl_class")
    return isinstance(function, ast.Name) and _LAYER.fullmatch(function.id) is not None


def _judge(entry: _Class, known: dict[str, dict[str, _Class]]) -> ModelClass | None:
    """None for a class without experts."""
    reached = _reached(entry, known)
    makers = [one for one in reached if one.expert_counts]
    if not makers:
        return None
    counts = [count for one in makers for count in one.expert_counts]
    redundant = all("redundant" in count for count in counts) and not any(one.asserts_none for one in makers)
    refusal = ""
    if not any(_PLACED in base.defines for base in _bases(entry, known)):
        refusal = "does not say how many experts it has"
    elif any(one.has_zero_experts for one in makers):
        refusal = "zero experts cannot be placed"
    return ModelClass(entry.name, f"{entry.file}.py", redundant and not refusal, refusal)


def _bases(entry: _Class, known: dict[str, dict[str, _Class]]) -> list[_Class]:
    found, waiting = [], [entry]
    while waiting:
        one = waiting.pop()
        found.append(one)
        names = [ast.unparse(base) for base in one.node.bases]
        waiting += [known[one.file][name] for name in names if name in known.get(one.file, {})]
    return found


def _reached(entry: _Class, known: dict[str, dict[str, _Class]]) -> list[_Class]:
    """The class and all classes of model files that it names, and those that these name."""
    found: dict[tuple[str, str], _Class] = {}
    waiting = [entry]
    while waiting:
        one = waiting.pop()
        if (one.file, one.name) in found:
            continue
        found[one.file, one.name] = one
        scope = known.get(one.file, {})
        waiting += [scope[name] for name in one.names if name in scope and not _DRAFT.search(name)]
    return list(found.values())
