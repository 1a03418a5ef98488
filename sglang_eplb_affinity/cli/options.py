"""Options and inputs that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology

Command = TypeVar("Command", bound=Callable[..., Any])

# Existence is checked where the file is read, so that the message says more than "does not exist".
FILE = click.Path(path_type=Path)


def topology_options(command: Command) -> Command:
    """``--gpus`` and ``--nodes``."""
    command = click.option("--nodes", type=int, default=1, show_default=True, help="Nodes that the GPUs sit in.")(
        command
    )
    return click.option("--gpus", type=int, required=True, help="GPUs of the expert-parallel group (EP size).")(command)


def check_output(path: Path) -> None:
    """Fail before long work, not after it, if the output cannot be written."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, but must be a file")


def topology_of(gpus: int, nodes: int) -> Topology:
    try:
        return Topology(gpus, nodes)
    except InputError:
        raise InputError(
            f"--gpus {gpus} --nodes {nodes}: both must be at least 1 and the GPUs must divide evenly over the nodes"
        ) from None
