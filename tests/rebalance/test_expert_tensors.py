"""Every tensor with a row for each local expert is found, whatever the model class names; others are refused."""

import pytest
import torch

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance.expert_tensors import check_slots, expert_modules, provide_weights
from sglang_eplb_affinity.rebalance.weights import LayerWeights

ROWS, SHARED = 5, 1  # slots of a rank, of them a shared expert's behind the routed ones


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


class Experts(torch.nn.Module):
    """As SGLang's FusedMoE: what is looked at has its names."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_id, self.num_local_experts, self.num_fused_shared_experts = layer, ROWS, SHARED
        self.w13_weight, self.w2_weight = parameter(ROWS, 8, 4), parameter(ROWS, 4, 4)
        self.w13_weight_scale_inv = parameter(ROWS, 2, 1)
        self.w2_input_scale = parameter(40)
        self.w2_input_scale._sglang_require_global_experts = True
        self.register_buffer("alphas", torch.ones(ROWS))


class Block(torch.nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_id = layer
        self.gate = torch.nn.Linear(4, 40)
        self.experts = Experts(layer)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), Block(1), Block(2)])


NAMED = ["w13_weight", "w2_weight", "w13_weight_scale_inv", "alphas"]


def test_weights_scales_and_buffers_are_found_without_the_shared_experts_rows() -> None:
    found = expert_modules(Model())
    assert list(found) == [1, 2]
    tensors = found[1].tensors()
    assert list(tensors) == NAMED
    assert {tensor.shape[0] for tensor in tensors.values()} == {ROWS - SHARED}


def test_copies_that_a_backend_derives_move_too_and_views_do_not_move_twice() -> None:
    model = Model()
    experts = model.layers[1].experts
    both = torch.zeros(2, ROWS, 6)  # two derived tensors in one allocation
    # MegaMoE: tuples of (the weights themselves, transposed scales of its own); HPC-Ops: padded scales.
    experts.mega_l1_weights = (experts.w13_weight.data, both[0])
    experts.mega_l2_weights = (experts.w2_weight.data.view(ROWS, 16), both[1])
    experts.hpc_ops_w13_weight_scale = torch.zeros(ROWS, 3, 4).transpose(1, 2)
    tensors = expert_modules(model)[1].tensors()
    assert list(tensors) == [*NAMED, "mega_l1_weights[1]", "mega_l2_weights[1]", "hpc_ops_w13_weight_scale"]


def test_numbers_by_slot_that_nobody_can_move_are_refused_by_name() -> None:
    model = Model()
    model.layers[2].experts.local_ids = torch.arange(ROWS)
    with pytest.raises(InputError, match=r"layer 2's Experts keeps local_ids, torch.int64 of shape \(5,\)"):
        expert_modules(model)[2].tensors()


def test_slots_that_the_model_did_not_make_are_refused() -> None:
    model = Model()
    check_slots(model, expert_modules(model), ROWS - SHARED, 0)
    with pytest.raises(InputError, match=r"redundant-experts 4: Model made 4 slots a rank in layer 1 where .* has 5"):
        check_slots(model, expert_modules(model), ROWS, 4)
    with pytest.raises(InputError, match="Linear has no expert modules"):
        check_slots(torch.nn.Linear(2, 2), {}, ROWS, 0)


class Lazy:
    """SGLang's LazyValue: made at the first look, from ``.data`` of the parameters."""

    def __init__(self, value: dict[int, list[torch.Tensor]]) -> None:
        self.value = value

    def __getattr__(self, name: str) -> object:
        return getattr(self.value, name)


def test_sglangs_rebalance_gets_the_tensors_under_the_name_it_asks_for() -> None:
    without, lazy = Model(), Model()
    lazy.routed_experts_weights_of_layer = Lazy({1: [lazy.layers[1].experts.w13_weight.data]})
    for model in (without, lazy):
        provide_weights(model, expert_modules(model))
        given = model.routed_experts_weights_of_layer
        assert sorted(given.keys()) == [1, 2] and len(given.get(2)) == len(NAMED)

    class Computes(Model):
        @property
        def routed_experts_weights_of_layer(self) -> dict[int, list[torch.Tensor]]:
            return {1: []}

    with pytest.raises(InputError, match="Computes names other weights than its expert layers have"):
        provide_weights(Computes(), expert_modules(Computes()))


@pytest.mark.parametrize("rebound", ["data", "parameter", "derived"])
def test_weights_that_the_model_put_elsewhere_are_noticed(rebound: str) -> None:
    model = Model()
    experts = model.layers[1].experts
    experts.mega_l1_weights = (experts.w13_weight.data, torch.zeros(ROWS, 6))
    found = expert_modules(model)[1]
    weights = LayerWeights.of(1, lambda: list(found.tensors().values()), ROWS - SHARED)
    weights.check_in_place()
    kept = [experts.w13_weight.data, experts.w2_weight, experts.mega_l1_weights]  # so that no address comes twice
    if rebound == "data":  # SGLang's quantisation methods do this after loading
        experts.w13_weight.data = torch.zeros(ROWS, 8, 4)
    elif rebound == "parameter":
        experts.w2_weight = parameter(ROWS, 4, 4)
    else:
        experts.mega_l1_weights = (experts.w13_weight.data, torch.zeros(ROWS, 6))
    with pytest.raises(RuntimeError, match="no longer where they were"):
        weights.check_in_place()
    assert kept
