"""What is refused at start-up because experts could not be moved, or chosen, right."""

from types import SimpleNamespace

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks import arguments
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.refusals import check_moving
from tests.sglang_hooks.arguments import TEXT, server_arguments

REST = dict(
    pp_size=1, tp_size=2, weight_cache_mode="off", enable_pdmux=False, enable_memory_saver=False, enable_lora=False,
    lora_target_modules=None, moe_runner_backend="triton", expert_distribution_recorder_mode="stat",
    expert_distribution_recorder_buffer_size=None, eplb_min_rebalancing_utilization_threshold=1.0,
    eplb_rebalance_layers_per_chunk=None,
)  # fmt: skip


def test_what_moves_is_not_refused() -> None:
    arguments.check(server_arguments(**REST))


@pytest.mark.parametrize("flag", ["moe_runner_backend", "moe_a2a_backend"])
def test_weights_in_objects_that_are_not_tensors(flag: str) -> None:
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} flashinfer_megamoe: keeps experts' weights"):
        check_moving(server_arguments(**{**REST, flag: "flashinfer_megamoe"}), "--eplb-algorithm affinity")


def test_a_router_with_zero_experts() -> None:
    """LongCat-Flash: 512 experts with weights and 256 without, as its configuration has them."""
    args = server_arguments(**REST)
    text = {"n_routed_experts": 512, "moe_topk": 12, "num_layers": 28, "zero_expert_num": 256}
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["LongcatFlashForCausalLM"]))
    model.hf_text_config = SimpleNamespace(**text)
    args.get_model_config = lambda: model
    with pytest.raises(InputError, match="its router also chooses 256 zero experts, which no map has"):
        arguments.check(args)


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (dict(num_local_experts=8, num_experts_per_tok=2, num_hidden_layers=4), (4, 8, 2, (0, 1, 2, 3))),  # Mixtral
        (
            dict(num_experts=256, num_experts_per_token=8, num_hidden_layers=3, first_k_dense_replace=1),
            (3, 256, 8, (1, 2)),
        ),
        (dict(moe_num_experts=48, moe_top_k=3, num_hidden_layers=4, moe_layers_enum="2,3"), (4, 48, 3, (2, 3))),  # Step
        ({**TEXT, "num_experts_per_tok": 2}, (3, 4, 2, (1, 2))),
    ],
    ids=["mixtral", "kimi-linear", "step3.5", "deepseek"],
)
def test_names_of_experts_and_top_k(names: dict[str, object], shape: tuple[object, ...]) -> None:
    found = MoeShape.of(SimpleNamespace(**names))
    assert found is not None
    assert (found.num_layers, found.num_experts, found.top_k, found.moe_layers) == shape
    assert MoeShape.of(SimpleNamespace(num_hidden_layers=4, hidden_size=64)) is None
