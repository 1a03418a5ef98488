"""What a server needs around it: environment variables and, for the CPU, the engine and a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.profile import Profile, ServerConfig
from sglang_eplb_affinity.domain.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
STAND_INS = ROOT / "bench" / "engines" / "cpu_engine" / "stand_ins"


# What the models made for the CPU and random ones are, and SGLang's files of them.
_OWN_MODELS = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v2",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
}


WITHOUT_WEIGHTS = ("random", "deepseek")


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


def check_gpus(profile: Profile) -> None:
    """Raise InputError unless this host has the GPUs that the profile's servers run on (none with the CPU engine)."""
    if profile.server.engine != "cuda":
        return
    import torch

    needed, found = profile.server.ranks // (1 + len(profile.server.other_hosts)), torch.cuda.device_count()
    if found < needed:
        raise InputError(
            f"--profile {profile.name}: needs {needed} GPU{'s' if needed > 1 else ''} on this host, but PyTorch sees "
            f"{found or 'none'}; --rehearse goes through its steps on the CPU"
        )


def prepare_engine(config: ServerConfig) -> Engine:
    """Build the model when the profile asks for a tiny or random one; everything else is only looked up."""
    # Times in the log to the millisecond: what happened in a row's steady part is read from it.
    environment = {**os.environ, "SGLANG_LOG_MS": "1", **config.environment}
    if config.engine == "cpu":
        environment |= cpu_environment(config.ranks)
    model = config.model
    if model.startswith("tiny:"):
        model = str(build_tiny_model(model.removeprefix("tiny:")))
    kind, colon, sizes = model.partition(":")
    if colon and kind in WITHOUT_WEIGHTS:
        model = str(write_model_config(kind, sizes))
    if config.engine == "cpu" and _architecture(model) in _OWN_MODELS:
        environment |= own_models_only()
    return Engine(model, environment)


def own_models_only() -> dict[str, str]:
    """Keeps each rank from importing SGLang's files of all other models, which takes 2 s of a core."""
    spec = importlib.util.find_spec("sglang")
    (package,) = (spec.submodule_search_locations if spec else None) or (".",)
    names = {path.stem for path in Path(package, "srt", "models").glob("*.py")}
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(names - set(_OWN_MODELS.values())))}


def _architecture(model: str) -> str:
    try:
        return str(json.loads(Path(model, "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):  # a hub id, or something that SGLang will complain of
        return ""


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
    from bench.engines.cpu_engine import tiny_models  # imports torch

    folder = CACHE / "tiny_models"
    tiny_models.build(folder)
    if not (folder / name / "config.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.glob("*/config.json")))
        raise InputError(f"--model: no tiny model {name!r}; known are {known}")
    return folder / name


def write_model_config(kind: str, sizes: str) -> Path:
    """Configuration and tokenizer of a model without weights, for `--load-format dummy`: ``kind`` `random` is a
    Qwen3Moe, `deepseek` has DeepSeek-V3's layers; ``sizes`` is KEY=N,..."""
    from bench.gpu import deepseek_shaped, random_moe  # import torch

    of_kind: Any = {"random": random_moe.MoeSizes, "deepseek": deepseek_shaped.DeepseekSizes}[kind]
    write: Any = {"random": random_moe.write_config, "deepseek": deepseek_shaped.write_config}[kind]
    folder = CACHE / f"{kind}_models" / sizes.replace("=", "").replace(",", "-")
    try:
        pairs = dict(part.split("=") for part in sizes.split(",") if part)
        write(folder, of_kind(**{key: int(value) for key, value in pairs.items()}))
    except (ValueError, TypeError):
        known = ", ".join(of_kind.__annotations__)
        raise InputError(f"--model: {kind}:{sizes} is not KEY=N,... with KEY one of {known}") from None
    return folder
