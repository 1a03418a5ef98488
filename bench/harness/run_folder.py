"""The folder of one run under results/: what was planned, and whether an interrupted run goes on in it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.harness.profile import LoadConfig, Profile, ServerConfig
from bench.harness.schedule import CellKey, Level, Sitting, plan_sittings
from bench.harness.store import Store
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunPlan:
    """Everything that decides what a run measures. Runs of one plan may be continued and their blocks add up."""

    profile: Profile
    arms: tuple[str, ...]
    concurrency: tuple[int, ...]
    blocks: int
    prompts: str  # the name of the ShareGPT source, without folders
    prompts_sha256: str
    loads: tuple[str, ...] = ("",)  # by name; the main load has none

    def cells(self) -> list[CellKey]:
        return [cell for sitting in self.sittings() for cell in sitting.cells]

    def sittings(self) -> list[Sitting]:
        return plan_sittings(self.arms, self.levels(), self.blocks, self.profile.arms_side_by_side)

    def levels(self) -> list[Level]:
        """The main load at each concurrency of the plan, then the other loads at all of theirs."""
        main = [Level(c, blocks=self.profile.load.blocks) for c in sorted(self.concurrency)] if "" in self.loads else []
        others = [(name, self.profile.loads[name]) for name in self.loads if name]
        return [*main, *(Level(c, name, load.blocks) for name, load in others for c in load.concurrency)]

    def fingerprint(self) -> str:
        """Equal for plans whose cells can be compared: all but the number of blocks, arms, loads and time limits."""
        data = asdict(self)
        for name in ("blocks", "arms", "concurrency", "loads"):
            del data[name]
        for name in ("arms", "blocks", "title"):
            del data["profile"][name]
        for name in ("port", "ready_timeout_s"):
            del data["profile"]["server"][name]
        for load in (data["profile"]["load"], *data["profile"]["loads"].values()):
            del load["cell_timeout_s"], load["blocks"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint(), **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> RunPlan:
        data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        data.pop("fingerprint")
        profile = dict(data["profile"])
        server = {key: tuple(value) if isinstance(value, list) else value for key, value in profile["server"].items()}
        config: Any = ServerConfig
        profile |= {"server": config(**server), "load": _load(profile["load"]), "arms": tuple(profile["arms"])}
        profile |= {"loads": {name: _load(load) for name, load in profile.get("loads", {}).items()}}
        return RunPlan(**{**data, "profile": Profile(**profile)})


def _load(data: dict[str, Any]) -> LoadConfig:
    requests = {int(c): n for c, n in data["requests"].items()}
    return LoadConfig(**{**data, "requests": requests, "input_tokens": tuple(data["input_tokens"])})


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def store(self) -> Store:
        return Store(self.path / "store.jsonl")

    def left(self, plan: RunPlan) -> list[Sitting]:
        """The sittings of a plan with what they still have to measure.

        Side by side, arms that are compared were measured in one sitting: a block's rows of one level are
        measured again unless all of them count and share it.
        """
        latest = self.store.latest()
        done = {key for key, record in latest.items() if not record.void}
        if plan.profile.arms_side_by_side:
            rows: dict[tuple[int, str, int], set[CellKey]] = {}
            for cell in plan.cells():
                rows.setdefault((cell.block, cell.load, cell.concurrency), set()).add(cell)
            for cells in rows.values():
                if not cells <= done or len({latest[c].provenance.get("sitting") for c in cells}) > 1:
                    done -= cells
        left = (Sitting(s.name, tuple(c for c in s.cells if c not in done)) for s in plan.sittings())
        return [sitting for sitting in left if sitting.cells]

    def plan(self) -> RunPlan:
        """The recorded plan; raises InputError when this is not the folder of a run."""
        file = self.path / "run.json"
        try:
            return RunPlan.from_json(json.loads(file.read_text(encoding="utf-8")))
        except OSError:
            raise InputError(f"{self.path}: not the folder of a benchmark run (no run.json)") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}: not the plan of a benchmark run") from None

    def environment(self) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"{self.path / 'environment.json'}: missing or not JSON") from None
        return data

    def write_json(self, name: str, data: Any) -> None:
        write_atomically(self.path / name, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def open_run(results: Path, name: str | None, plan: RunPlan, hardware: str) -> tuple[RunFolder, bool]:
    """The folder for this plan, and whether it continues an earlier run.

    A named run is continued if it exists (and must have the same plan and hardware). Without a name the newest
    unfinished run of the same plan and hardware is continued, else a new one is begun.
    """
    if name is None:
        for path in sorted(results.glob("run-*/run.json"), reverse=True):
            folder = RunFolder(path.parent)
            if _continues(folder, plan, hardware) is None and _unfinished(folder, plan):
                return folder, True
        name = f"run-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    elif not _NAME.fullmatch(name):
        raise InputError(f"--run: {name!r} is not a usable name; use letters, digits, dot, dash and underscore")
    folder = RunFolder(results / name)
    if not (folder.path / "run.json").is_file():
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder, False
    if reason := _continues(folder, plan, hardware):
        raise InputError(f"--run: {folder.path} holds a run with {reason}; choose another name")
    return folder, True


def _continues(folder: RunFolder, plan: RunPlan, hardware: str) -> str | None:
    """None if ``plan`` can go on in this folder, else what is different there."""
    try:
        if folder.plan().fingerprint() != plan.fingerprint():
            return "another profile, model or prompts"
        if _compared(folder.environment().get("hardware", ""), plan) != _compared(hardware, plan):
            return "other hardware"
    except InputError as error:
        return f"an unreadable plan ({error})"
    return None


def _compared(hardware: str, plan: RunPlan) -> str:
    """What must be the same for blocks to add up: with GPUs only these, since rented hosts differ in the rest."""
    gpus = [part.split(" (of ")[0] for part in hardware.split(", ") if " cores of " not in part]
    return ", ".join(gpus) if gpus and plan.profile.server.engine == "cuda" else hardware


def _unfinished(folder: RunFolder, plan: RunPlan) -> bool:
    same = folder.plan()
    wanted = (plan.arms, plan.concurrency, plan.blocks, plan.loads)
    return (same.arms, same.concurrency, same.blocks, same.loads) == wanted and bool(folder.left(plan))
