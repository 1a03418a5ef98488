"""Options and inputs that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import MOST_SEED

Command = TypeVar("Command", bound=Callable[..., Any])

# Existence is checked where the file is read, so that the message says more than "does not exist".
MOST_GPUS = 1 << 16
FILE = click.Path(path_type=Path)


class _Finite(click.types.FloatParamType):
    """A float that is neither nan nor infinite: both pass comparisons that are meant to refuse them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


FINITE = _Finite()


def topology_options(command: Command) -> Command:
    """``--gpus`` and ``--nodes``."""
    command = click.option("--nodes", type=int, default=1, show_default=True, help="Nodes that the GPUs sit in.")(
        command
    )
    return click.option("--gpus", type=int, required=True, help="GPUs of the expert-parallel group (EP size).")(command)


def dense_layers_option(command: Command) -> Command:
    """``--dense-layers``, the same in every command."""
    return click.option(
        "--dense-layers", type=click.IntRange(0, 1000), default=0, show_default=True,
        help="Leading dense layers of the model (3 for DeepSeek-V3). SGLang's maps, dumps and responses "
        "have a row for each; traces, vllm-ascend's and TensorRT-LLM's maps leave them out.",
    )(command)  # fmt: skip


def seed_option(command: Command) -> Command:
    """``--seed``: what every generator of random numbers here takes."""
    return click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)(command)


def check_png(path: Path | None, flag: str) -> None:
    if path is not None and path.suffix != ".png":
        raise InputError(f"{flag} {path}: must end in .png")


def say(line: str) -> None:
    """A note of a reader, on standard error."""
    click.echo(f"note: {line}", err=True)


def check_output(path: Path, *, standard_output: bool = True) -> None:
    """Fail before long work, not after it, if the output cannot be written or is a file that the command reads."""
    if str(path) == "-":
        if standard_output:
            return
        raise InputError(f"{path}: standard output has the table; give a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, but must be a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written (Permission denied)")
    for name, value in click.get_current_context().params.items():
        for other in value if isinstance(value, tuple) else (value,):
            if isinstance(other, Path) and name not in _OUTPUTS and _same(path, other):
                raise InputError(f"{path}: is an input of this command too; give another file to write")


_OUTPUTS = ("out", "report", "plot", "plots")


def _same(output: Path, other: Path) -> bool:
    try:
        return output.is_file() and output.samefile(other)
    except OSError:
        return False


def topology_of(gpus: int, nodes: int) -> Topology:
    if gpus > MOST_GPUS:
        raise InputError(f"--gpus {gpus}: must be at most {MOST_GPUS}")
    try:
        return Topology(gpus, nodes)
    except InputError:
        raise InputError(
            f"--gpus {gpus} --nodes {nodes}: both must be at least 1 and the GPUs must divide evenly over the nodes"
        ) from None
