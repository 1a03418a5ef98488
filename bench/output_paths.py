"""``--out`` of what measures: looked at before it starts, because it may take minutes of a rented machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


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


def _check_writable(text: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: no permission to write in {there}")
