"""Flags of ``plan`` that do not go together: said before anything is read, so that nothing is silently left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.survival import Survive

# What EPLB's own placements know nothing of.
_OF_AFFINITY = (
    "objective", "prefill_share", "max_load_increase", "load_noise_allowance", "p95_allowance", "node_weight",
    "survive", "current_map", "max_moves", "report", "further_slots",
)  # fmt: skip


def check_flags(topology: Topology, values: dict[str, Any]) -> None:
    """``values``: of the command's parameters, by their names. Raises InputError for the first that cannot be meant."""
    given = _given()
    if values["max_moves"] is not None and values["current_map"] is None:
        raise InputError(
            f"--max-moves {values['max_moves']}: makes the plan incremental, as the server's flag does; give the "
            "current map too (--current-map)"
        )
    ignored = [name for name in _OF_AFFINITY if name in given]
    if values["algorithm"] != "affinity" and ignored:
        raise InputError(f"{_flag(ignored[0])}: needs --algorithm affinity, not {values['algorithm']}")
    _check_redundant(values)
    further, dispatch = values["further_slots"], values["dispatch"]
    if further and dispatch != "primary":
        raise InputError(f"--further-slots {further}: needs --dispatch primary, not {dispatch}")
    if values["redundant"].isdecimal():
        check_further_slots(further, int(values["redundant"]), topology.num_gpus)
    if values["prefill_share"] is not None and values["objective"] != "mixed":
        raise InputError(f"--prefill-share {values['prefill_share']}: needs --objective mixed")
    _check_survive(topology, values["survive"], values["redundant"], values["max_moves"])
    report: Path | None = values["report"]
    if report is not None and report.absolute() == values["out"].absolute() and str(report) != "-":
        raise InputError(f"--report {report}: is the file of --out too; give another")


def _check_redundant(values: dict[str, Any]) -> None:
    redundant, memory_gb, expert_mb = (values[name] for name in ("redundant", "memory_gb", "expert_mb"))
    if redundant != "auto":
        if not redundant.isdecimal():
            raise InputError(f"--redundant {redundant}: must be a whole number, 0 or more, or auto")
        for name in ("memory_gb", "expert_mb"):
            if values[name] is not None:
                raise InputError(f"{_flag(name)} {values[name]:g}: only with --redundant auto, not {redundant}")
        return
    for name in ("memory_gb", "expert_mb"):
        value = values[name]
        if value is None or value <= 0:
            raise InputError(
                f"--redundant auto: needs --memory-gb and --expert-mb, both above 0; {_flag(name)} is "
                f"{'not given' if value is None else f'{value:g}'}"
            )
    assert memory_gb is not None and expert_mb is not None
    if values["algorithm"] != "affinity":
        raise InputError(f"--redundant auto: needs --algorithm affinity, not {values['algorithm']}")
    if values["current_map"] is not None:
        raise InputError(
            f"--redundant auto: chooses the slots, but those of --current-map {values['current_map']} are what they "
            "are; give a number"
        )


def _check_survive(topology: Topology, survive: Survive, redundant: str, max_moves: int | None) -> None:
    """As --eplb-affinity-survive of the server."""
    if survive == "none":
        return
    units = topology.num_gpus if survive == "rank" else topology.num_nodes
    if units < 2:
        raise InputError(
            f"--survive {survive}: needs two {'GPUs' if survive == 'rank' else 'nodes'} or more, but "
            f"--{'gpus' if survive == 'rank' else 'nodes'} is {units}"
        )
    if max_moves is not None:
        raise InputError(
            f"--survive {survive}: with --max-moves {max_moves} the plan may not make the replicas that are missing; "
            "leave one of the flags out"
        )
    if redundant.isdecimal() and not int(redundant):
        raise InputError(f"--survive {survive}: no expert is on two GPUs without redundant experts; give --redundant")


def slots_of(redundant: int, num_experts: int, num_gpus: int) -> int:
    """Slots with ``redundant`` experts, of ``--redundant``; raises InputError where they cannot be."""
    slots, most = num_experts + redundant, num_experts * (num_gpus - 1)
    if redundant > most:
        raise InputError(f"--redundant {redundant}: {most} already put every expert on every GPU")
    if slots % num_gpus:
        low = max(slots // num_gpus * num_gpus - num_experts, -num_experts % num_gpus)
        raise InputError(
            f"--redundant {redundant}: with {num_experts} experts this makes {slots} slots, which do not divide evenly "
            f"over {num_gpus} GPUs; use {low} or {low + num_gpus}"
        )
    return slots


def check_further_slots(further: int, redundant: int, num_gpus: int) -> None:
    """Raise InputError where a GPU has fewer slots besides the primary ones, as the server does."""
    if further > redundant // num_gpus:
        raise InputError(
            f"--further-slots {further}: {redundant} redundant experts on {num_gpus} GPUs make {redundant // num_gpus} "
            "slots of a GPU besides the primary ones; use no more"
        )


def check_current(current: ExpertMap, num_experts: int, redundant: int, source: str) -> None:
    if current.num_slots != num_experts + redundant:
        raise InputError(
            f"{source}: has {current.num_slots} slots, but {num_experts} experts with --redundant {redundant} are "
            f"{num_experts + redundant}; give --redundant {current.num_slots - num_experts}"
        )


@contextmanager
def flags_named() -> Iterator[None]:
    """What the planner says of a setting becomes what is said of its flag."""
    try:
        yield
    except InputError as error:
        raise InputError(
            re.sub(r"^planner: (\w+)=(\S+)", lambda m: f"{_flag(m[1])} {m[2].strip(chr(39))}:", str(error))
        ) from None


def _given() -> set[str]:
    context = click.get_current_context()
    return {n for n in context.params if context.get_parameter_source(n) is ParameterSource.COMMANDLINE}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
