"""docs/models.md and the summary's entries ``models.*``: the model classes of the installed SGLang."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from bench.harness.environment import now, provenance
from bench.publish.model_classes import ModelClass, model_classes
from bench.publish.summary import Figure
from sglang_eplb_affinity.domain.errors import InputError

HEAD = """# Model classes

Made by `python -m bench docs` from the source of the {count} classes with experts in patched SGLang {version}:
{supported} can be served with EPLB and maps, {redundant} of them with redundant experts; the others are refused at
start-up. Draft models are not in the list: their experts stay in their own order, beside any target. Served in tests,
with rebalances that must not change outputs: `Qwen3MoeForCausalLM`, `DeepseekV3ForCausalLM`, `Glm4MoeForCausalLM` and
`Qwen2MoeForCausalLM`; of the others this is what their source says, and a server checks slots and weights again once
they are loaded.

| class | EPLB and maps | redundant experts | why not |
|---|---|---|---|
"""
NO_REDUNDANT = "makes no slots for redundant experts"


def installed() -> tuple[str, list[ModelClass]] | None:
    """(version, classes) of the SGLang of this Python; None where there is none."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    return importlib.metadata.version("sglang"), model_classes(Path(spec.submodule_search_locations[0]))


def models_page(version: str, classes: Sequence[ModelClass]) -> str:
    supported = [one for one in classes if not one.refusal]
    head = HEAD.format(
        count=len(classes),
        version=version,
        supported=len(supported),
        redundant=sum(one.redundant for one in supported),
    )
    return head + "".join(_row(one) for one in classes)


def _row(one: ModelClass) -> str:
    placed, redundant = ("no" if one.refusal else "yes"), ("yes" if one.redundant else "no")
    why = one.refusal or ("" if one.redundant else NO_REDUNDANT)
    return f"| `{one.architecture}` | {placed} | {redundant} | {why} |\n"


def figures_of_models() -> list[Figure]:
    """``models.supported`` and ``models.refused``: numbers of classes, of the installed SGLang."""
    found = installed()
    if found is None:
        raise InputError("SGLang is not installed; run `make setup`")
    about = provenance()
    refused = sum(bool(one.refusal) for one in found[1])
    return [
        Figure(
            name=f"models.{name}", value=value, lower=value, upper=value, unit="model classes", kind="measured",
            hardware=about["hardware"], versions=about["versions"], commit=about["commit"], date=now(),
            command="python -m bench summary from-models --output FILE",
        )
        for name, value in (("supported", len(found[1]) - refused), ("refused", refused))
    ]  # fmt: skip
