"""``--out`` of what measures: looked at before, since measuring may take minutes of a rented machine, and written."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sglang_eplb_affinity.domain.files import write_atomically


def result_file(text: str) -> Path:
    """Type of an argparse option: a file that can be written, in a folder that need not be there yet."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    _check_writable(text, path.parent)
    return path


def result_folder(text: str) -> Path:
    """The same for a folder."""
    path = Path(text)
    _check_writable(text, path)
    return path


class ResultFolder(click.ParamType):
    """:func:`result_folder` as the type of a click option."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return result_folder(str(value))
        except argparse.ArgumentTypeError as error:
            self.fail(str(error), param, ctx)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """``result`` as JSON; makes the folder that :func:`result_file` allowed to be missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1, default=float) + "\n").encode())


def _check_writable(text: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: no permission to write in {there}")
