"""What a server needs around it: environment variables and, for the CPU, the engine and a tiny model."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.profile import ServerConfig
from sglang_eplb_affinity.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
STAND_INS = ROOT / "bench" / "cpu_engine" / "stand_ins"


@dataclass(frozen=True)
class Engine:
    """A model path that SGLang can load, and the environment of the server and the load generator."""

    model: str
    environment: dict[str, str]


def check_sglang() -> None:
    """Raise InputError unless this Python has SGLang with our patch series on it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"SGLang is not installed for {sys.executable}; run `make setup`, or set PYTHON")
    # The one file that the series adds.
    if not (Path(spec.submodule_search_locations[0]) / "srt" / "eplb" / "eplb_affinity.py").is_file():
        raise InputError(f"the SGLang of {sys.executable} is not patched; run `make apply`")


def prepare_engine(config: ServerConfig) -> Engine:
    """Build the tiny model when the profile asks for one; everything else is only looked up."""
    environment = {**os.environ, **config.environment}
    if config.engine == "cpu":
        environment |= cpu_environment(config.ranks)
    model = config.model
    if model.startswith("tiny:"):
        model = str(build_tiny_model(model.removeprefix("tiny:")))
    return Engine(model, environment)


def cpu_environment(ranks: int) -> dict[str, str]:
    """Environment of SGLang's CPU engine: one thread a rank, ranks spread over the cores."""
    cores = sorted(os.sched_getaffinity(0))
    python_path = os.pathsep.join(filter(None, [str(STAND_INS), os.environ.get("PYTHONPATH", "")]))
    return {
        "PYTHONPATH": python_path,
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def build_tiny_model(name: str) -> Path:
    """Random weights in float32, made on the spot in well under a second."""
    from bench.cpu_engine import tiny_models  # imports torch

    folder = CACHE / "tiny_models"
    tiny_models.build(folder)
    if not (folder / name / "config.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.glob("*/config.json")))
        raise InputError(f"--model: no tiny model {name!r}; known are {known}")
    return folder / name
