"""What a server on the CPU gets around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.harness.engine import check_sglang, prepare_engine
from bench.harness.profile import ServerConfig
from sglang_eplb_affinity.domain.errors import InputError

DISABLED = "SGLANG_DISABLED_MODEL_ARCHS"


def environment(model: str, engine: str = "cpu") -> dict[str, str]:
    return prepare_engine(ServerConfig(model, 2, engine=engine)).environment


def test_only_the_files_of_our_own_models_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check_sglang()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.delenv(DISABLED, raising=False)
    left_out = environment("bench/engines/tiny_moe/model")[DISABLED].split(",")
    assert "llama" in left_out and not {"qwen3_moe", "deepseek_v2"} & set(left_out)
    # Of another model it is not known which files it takes.
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert not any(DISABLED in environment(model) for model in (str(tmp_path), "hub/id"))
    assert DISABLED not in environment("bench/engines/tiny_moe/model", "cuda")
