"""What a server needs around it: environment variables and, for the CPU, the engine and a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.profile import ServerConfig
from sglang_eplb_affinity.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
CPU_ENGINE = Path(os.environ.get("BENCH_CPU_ENGINE", ROOT / "bench" / "cpu_engine"))


@dataclass(frozen=True)
class Engine:
    """A model path that SGLang can load, and the environment of the server and the load generator."""

    model: str
    environment: dict[str, str]


def prepare_engine(config: ServerConfig) -> Engine:
    """Build the tiny model when the profile asks for one; everything else is only looked up."""
    environment = {**os.environ, **config.environment}
    if config.engine == "cpu":
        environment |= cpu_environment(config.ranks)
    model = config.model
    if model.startswith("tiny:"):
        model = str(build_tiny_model(model.removeprefix("tiny:"), environment))
    return Engine(model, environment)


def cpu_environment(ranks: int) -> dict[str, str]:
    """Environment of SGLang's CPU engine: one thread a rank, ranks spread over the cores."""
    cores = sorted(os.sched_getaffinity(0))
    python_path = os.pathsep.join(filter(None, [str(CPU_ENGINE), os.environ.get("PYTHONPATH", "")]))
    return {
        "PYTHONPATH": python_path,
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def build_tiny_model(name: str, environment: dict[str, str]) -> Path:
    """Random weights in float32, made on the spot in well under a second."""
    folder = CACHE / "models"
    builder = CPU_ENGINE / "make_tiny_models.py"
    if not builder.is_file():
        raise InputError(f"{builder}: missing, but the profile serves a tiny model")
    command = [sys.executable, str(builder), str(folder)]
    done = subprocess.run(command, env={**environment, "DT": "fp32"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    if not (folder / name / "config.json").is_file():
        known = ", ".join(sorted(p.parent.name for p in folder.glob("*/config.json")))
        raise InputError(f"--model: no tiny model {name!r}; known are {known}")
    return folder / name
