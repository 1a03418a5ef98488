"""What is read from the source of model classes, on a small SGLang written here."""

from pathlib import Path

import pytest

from bench.publish.model_classes import ModelClass, model_classes
from bench.publish.models_page import models_page
from sglang_eplb_affinity.domain.errors import InputError

BASE = """
class Block:
    def __init__(self, config):
        self.num_experts = config.num_experts + get_exec().moe.ep_num_redundant_experts
        self.experts = get_moe_impl_class(None)(num_experts=self.num_experts, layer_id=0)

class BaseForCausalLM:
    layer = Block
    @classmethod
    def get_model_config_for_expert_location(cls, config): ...

class DraftNextN:
    layer = Block

EntryClass = [BaseForCausalLM, DraftNextN]
"""
OTHERS = """
from sglang.srt.models.base import BaseForCausalLM as Base, Block

class Few:
    def __init__(self, config):
        self.experts = FusedMoE(num_experts=config.num_experts, layer_id=0)

class InheritedForCausalLM(Base): ...

class SilentForCausalLM:
    layer = Block

class FewForCausalLM(Base):
    layer = Few

class DenseForCausalLM:
    layer = Linear

EntryClass = [InheritedForCausalLM, SilentForCausalLM, FewForCausalLM, DenseForCausalLM]
"""
ZERO = """
class Router:
    def __init__(self, config):
        self.zero = config.zero_expert_num
        self.experts = get_moe_impl_class(None)(num_experts=config.num_experts)

class ZeroForCausalLM:
    layer = Router
    @classmethod
    def get_model_config_for_expert_location(cls, config): ...

EntryClass = ZeroForCausalLM
"""


@pytest.fixture
def sglang(tmp_path: Path) -> Path:
    folder = tmp_path / "sglang" / "srt" / "models"
    folder.mkdir(parents=True)
    for name, text in (("base", BASE), ("others", OTHERS), ("zero", ZERO)):
        (folder / f"{name}.py").write_text(text)
    return tmp_path / "sglang"


def test_classes_with_experts_are_judged_by_what_they_and_their_bases_define(sglang: Path) -> None:
    assert model_classes(sglang) == [
        ModelClass("BaseForCausalLM", "base.py", True, ""),
        ModelClass("FewForCausalLM", "others.py", False, ""),
        ModelClass("InheritedForCausalLM", "others.py", True, ""),
        ModelClass("SilentForCausalLM", "others.py", False, "does not say how many experts it has"),
        ModelClass("ZeroForCausalLM", "zero.py", False, "zero experts cannot be placed"),
    ]
    with pytest.raises(InputError, match="has no srt/models"):
        model_classes(sglang / "srt")


def test_the_page_counts_and_says_why(sglang: Path) -> None:
    page = models_page("1.2.3", model_classes(sglang))
    assert "the 5 classes with experts in patched SGLang 1.2.3:\n3 can be served" in page and "2 of them with" in page
    assert "| `FewForCausalLM` | yes | no | makes no slots for redundant experts |" in page
    assert "| `ZeroForCausalLM` | no | no | zero experts cannot be placed |" in page
