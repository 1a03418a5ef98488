"""docs/flags.md: the flags of the patch series and the options of the command line, from where they are defined."""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import click

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.domain.errors import InputError

HEAD = """# Flags

Made by `python -m bench docs` from the patch series for SGLang {version} and from the command line itself.

## Of the server

Those that the series adds to `python -m sglang.launch_server`. SGLang's own that matter beside them: `--eplb-algorithm`
(`affinity` turns EPLB on), `--ep-num-redundant-experts` (0; experts + redundant must divide by the EP size),
`--eplb-rebalance-num-iterations` (1000 passes between rebalances) and `--init-expert-location` (the map to start from:
recorded, SGLang's, vllm-ascend's or TensorRT-LLM's; see [static_maps.md](static_maps.md)).
"""
COMMANDS = """
## Of the command line

`python -m sglang_eplb_affinity COMMAND`; none needs SGLang or a GPU.
"""
_PATCH = "eplb-affinity-flags.patch"


@dataclass(frozen=True)
class ServerFlag:
    """``default``: as in the help; "" where there is none."""

    name: str
    default: str
    help: str


def flags_page(root: Path) -> str:
    """Of the newest SGLang that there is a series for."""
    series = newest_series(root)
    rows = [
        (f"`{flag.name}`", f"`{flag.default}`" if flag.default else "", flag.help)
        for flag in server_flags((series / _PATCH).read_text(encoding="utf-8"), str(series / _PATCH))
    ]
    parts = [HEAD.format(version=series.name), _table(("flag", "default", "meaning"), rows), COMMANDS]
    for name, command in cli.commands.items():
        first = " ".join((command.help or "").split("\n\n")[0].split())
        parts.append(f"### `{name}`\n\n{first}\n\n{_options(command)}\n")
    return "\n".join(parts)


def newest_series(root: Path) -> Path:
    """The folder of the newest SGLang that there is a series for."""
    return max((root / "patches").iterdir(), key=lambda path: tuple(map(int, path.name.split("."))))


def server_flags(patch: str, source: str) -> list[ServerFlag]:
    """The fields `NAME: A[TYPE, "help"] = default` that a patch adds, in its order; raises InputError without any."""
    added = [line[1:] for line in patch.splitlines() if line.startswith("+") and not line.startswith("+++")]
    found = []
    for text in re.findall(r"^    \w+: A\[\n(?:        .*\n)+    \] = .*$", "\n".join(added), re.MULTILINE):
        field = ast.parse(textwrap.dedent(text)).body[0]
        assert isinstance(field, ast.AnnAssign) and isinstance(field.annotation, ast.Subscript)
        assert isinstance(field.target, ast.Name) and isinstance(field.annotation.slice, ast.Tuple)
        parts = [part.value for part in field.annotation.slice.elts if isinstance(part, ast.Constant)]
        value = ast.literal_eval(field.value) if field.value is not None else None
        default = "off" if value is False else "" if value is None else str(value)
        found.append(ServerFlag(f"--{field.target.id.replace('_', '-')}", default, str(parts[-1])))
    if not found:
        raise InputError(f"{source}: adds no field of server arguments that can be read")
    return found


def _options(command: click.Command) -> str:
    context = click.Context(command)
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None:
            continue
        name, help_text = record
        default = re.search(r"\[([^\[\]]*)\]$", help_text)
        note = default.group(1) if default else ""
        meaning = help_text.removesuffix(f"[{note}]").strip() if note else help_text
        rows.append((f"`{' '.join(name.split())}`", note.removeprefix("default: "), meaning))
    return _table(("option", "default", "meaning"), rows)


def _table(titles: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
