"""Expert weights as bytes, whatever their layout; staging rows; map tables in place."""

import numpy as np
import pytest
import torch

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.rebalance.layer_moves import layer_plan
from sglang_eplb_affinity.rebalance.map_tables import MapTables
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer, slot_bytes, widest


def layouts() -> dict[str, torch.Tensor]:
    """[6, 4, 3] of different dtypes and inner strides; each slot filled with its number."""
    values = torch.arange(6.0).view(6, 1, 1)
    padded = torch.zeros(6, 5, 4)[:, :4, :3]
    padded.copy_(values.expand(6, 4, 3))
    return {
        "contiguous": values.expand(6, 4, 3).contiguous(),
        "transposed": values.expand(6, 3, 4).contiguous().transpose(1, 2),
        "padded": padded,
        "float8": values.expand(6, 4, 3).contiguous().to(torch.float8_e4m3fn),
        "view of a larger tensor": values.expand(6, 4, 3).repeat(2, 1, 1)[6:],
        "one row": values.expand(6, 1, 3).contiguous(),
    }


@pytest.mark.parametrize("name", list(layouts()))
def test_copying_bytes_of_a_slot_copies_the_slot(name: str) -> None:
    tensor = layouts()[name]
    live = slot_bytes(tensor)
    assert live.shape[0] == 6 and live.data_ptr() == tensor.data_ptr()
    weights = LayerWeights.of(0, lambda: [tensor], 6)
    staging = StagingBuffer(2, weights.row_bytes, "cpu")
    ((part,),) = staging.parts(weights, [1])
    part.copy_(live[4])
    target = widest(live[1])
    target.copy_(part.view(target.dtype))
    slots = tensor.float()
    assert (slots[1] == 4).all() and (slots[0] == 0).all() and (slots[2] == 2).all()


def test_slots_that_interleave_are_refused() -> None:
    with pytest.raises(InputError, match="do not keep an expert's bytes together"):
        slot_bytes(torch.zeros(3, 4).transpose(0, 1))


def test_a_tensor_of_another_number_of_slots_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer 7 has expert weights of shape \(5, 2\), but this rank has 6 slots"):
        LayerWeights.of(7, lambda: [torch.zeros(5, 2)], 6)


def test_parts_of_a_row_do_not_overlap_and_are_aligned() -> None:
    weights = LayerWeights.of(
        0, lambda: [torch.zeros(2, 7), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 100)], 2
    )
    assert weights.bytes_per_expert == 28 + 3 + 400
    (a, b, c) = weights.columns
    assert a[1] <= b[0] and b[1] <= c[0] and c[1] <= weights.row_bytes
    assert all(start % 256 == 0 for start, _ in (a, b, c)) and weights.row_bytes % 256 == 0


def test_tables_are_changed_in_place_and_old_columns_are_cleared() -> None:
    topology, experts = Topology(2), 4
    old = np.array([[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 0, 0]], np.int32)
    new = np.array([3, 1, 2, 3, 0, 2], np.int32)
    before = ExpertMap(old, experts)
    slots = torch.from_numpy(old.astype(np.int64))
    table = torch.full((2, experts, 6), -1)
    width = before.logical_to_all_physical().shape[2]
    table[:, :, :width] = torch.from_numpy(before.logical_to_all_physical().astype(np.int64))
    valid, static = (table >= 0).sum(2), torch.zeros(2, experts, dtype=torch.int64)
    row, host_slots, host_table = table[1], slots.clone(), table.clone()
    tables = MapTables(slots, table, valid, static, host_slots, host_table, rank=1)
    plan = layer_plan(1, old[1], new, experts, topology, "static")
    tables.commit(tables.stage(plan))
    after = ExpertMap(np.stack([old[0], new]), experts)
    expected = after.logical_to_all_physical()
    assert (slots.numpy() == after.physical_to_logical).all() and (host_slots == slots).all()
    assert (table[:, :, : expected.shape[2]].numpy() == expected).all() and (host_table == table).all()
    assert (table[:, :, expected.shape[2] :] == -1).all() and row.data_ptr() == table[1].data_ptr()
    assert (valid.numpy() == after.replica_counts()).all()
    assert plan.static_choice is not None and (static[1].numpy() == plan.static_choice[1]).all()
    assert not static[0].any()
