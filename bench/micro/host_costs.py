"""What recording and --eplb-async cost the host: microseconds of the threads of a serving process.

    python -m bench.micro.host_costs --out FILE.json

Where passes wait for the host (decoding small batches), these add to a pass. In the thread that launches forward
passes: ``recorder`` and ``word``; ``taking`` once a round, ``commit`` once a layer and round. In a thread beside it,
which shares the interpreter lock: ``stage`` and ``prepare``, once a layer and round. Experts are tiny here, so that
launching copies is timed, not the copies. On a GPU if there is one, else with CPU tensors, without a driver's calls.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.harness.environment import now, provenance
from bench.harness.output_paths import write_result
from bench.micro.options import out_and_repeats
from sglang_eplb_affinity.device.recorder import AffinityRecorder, RecorderConfig
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.rebalance.agreement import GlooAgreement
from sglang_eplb_affinity.rebalance.commit import LayerCommitter
from sglang_eplb_affinity.rebalance.host_staged import HostStagedTransfer
from sglang_eplb_affinity.rebalance.layer_moves import Arrival, LayerJob, layer_plan
from sglang_eplb_affinity.rebalance.map_tables import MapTables
from sglang_eplb_affinity.rebalance.peer_copy import PeerCopyTransfer
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer
from sglang_eplb_affinity.rebalance.window_exchange import WindowShape
from sglang_eplb_affinity.sglang_hooks.window_snapshot import RecorderWindow

LAYERS, EXPERTS, SLOTS, TOKENS, TOP_K, WINDOW = 6, 64, 72, 64, 8, 100
LOCAL = SLOTS // 2
Step = Callable[[], object]


def new_recorder(device: torch.device) -> AffinityRecorder:
    """With a sample that one window of passes fills."""
    config = RecorderConfig(sample_tokens=WINDOW * TOKENS, quiet_between_passes=False)
    return AffinityRecorder(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, device=device, config=config)


def recorder_step(device: torch.device, passes_before: int) -> tuple[Step, Step]:
    """(begin a window and record ``passes_before`` passes of it, one pass more)."""
    recorder = new_recorder(device)

    def one_pass() -> None:
        recorder.begin_pass([TOKENS], phase=1)
        recorder.end_pass()

    def begin() -> None:
        recorder.reset()
        for _ in range(passes_before):
            one_pass()

    return begin, one_pass


def window_step(device: torch.device) -> tuple[Step, Step]:
    """(record half of a window, take it): once a round, between two passes."""
    recorder = new_recorder(device)
    shape = WindowShape(LAYERS, EXPERTS, TOP_K, recorder.config.sample_tokens)
    window = RecorderWindow(recorder, recorder.reset, shape, device, seed=0)

    def record() -> None:
        for _ in range(WINDOW // 2):
            recorder.begin_pass([TOKENS], phase=1)

    return record, window.take


def word_step() -> tuple[Step, Step]:
    """(take what was agreed, hand in a word): the second is timed."""
    agreement = GlooAgreement(dist.new_group(backend="gloo"), lag=1)
    return agreement.take, lambda: agreement.hand_in(1)


def layer_steps(device: torch.device) -> dict[str, tuple[Step, Step]]:
    """Staging, preparing and committing a layer in which every slot of this rank takes another's expert."""
    tensors = [torch.zeros(LOCAL, *shape, dtype=torch.bfloat16, device=device) for shape in ((64, 32), (32, 32))]
    weights = LayerWeights.of(0, lambda: tensors, LOCAL)
    staging = StagingBuffer(LOCAL, weights.row_bytes, device)
    order = np.arange(SLOTS, dtype=np.int32) % EXPERTS
    plan = layer_plan(0, order, np.roll(order, 1), EXPERTS, Topology(2, 1), "static")
    job = LayerJob(0, tuple(Arrival(slot, 0, (slot + 1) % LOCAL) for slot in range(LOCAL)), ())
    table = ExpertMap(order[None], EXPERTS).logical_to_all_physical().astype(np.int64)
    replicas = torch.full((1, EXPERTS, SLOTS), -1)
    replicas[:, :, : table.shape[2]] = torch.from_numpy(table)
    slots = torch.from_numpy(order[None].astype(np.int64))
    counts = (replicas >= 0).sum(2)
    on_device = (slots.to(device), replicas.to(device), counts.to(device), replicas[:, :, 0].to(device))
    committer = LayerCommitter({0: weights}, MapTables(*on_device, slots, replicas, 0), device)
    if device.type == "cuda":
        transfer = PeerCopyTransfer({0: {0: weights}}, device)
        stage: Step = partial(transfer.begin, job, staging)
        settle: Step = partial(torch.cuda.synchronize, device)
    else:
        by_host = HostStagedTransfer({0: weights}, 0, int, None, device)
        stage = partial(by_host.copy_local, job, list(enumerate(job.arrivals)), staging)
        settle = int  # nothing to wait for
    staged = committer.prepare(plan, job, staging)
    return {
        "stage a layer (beside)": (settle, stage),
        "prepare a layer (beside)": (settle, lambda: committer.prepare(plan, job, staging)),
        "commit a layer": (settle, lambda: committer.commit(staged)),
    }


def microseconds(before: Step, step: Step, repeats: int) -> list[float]:
    """Times of ``step``, each after ``before``; the first tenth, at least 3, warms up."""
    found = []
    for _ in range(repeats + max(repeats // 10, 3)):
        before()
        began = time.perf_counter()
        step()
        found.append(1e6 * (time.perf_counter() - began))
    return found[-repeats:]


def main(arguments: Sequence[str] | None = None) -> int:
    options = out_and_repeats("bench.micro.host_costs", __doc__, 200, arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        steps = {
            "recorder, a pass while the sample fills": recorder_step(device, WINDOW // 2),
            "recorder, a pass once it is full": recorder_step(device, 2 * WINDOW),
            "word, handing it in": word_step(),
            "taking a window": window_step(device),
            **layer_steps(device),
        }
        rows: dict[str, Any] = {}
        for name, (before, step) in steps.items():
            times = microseconds(before, step, options.repeats)
            rows[name] = {f"p{q}": round(float(np.percentile(times, q)), 1) for q in (10, 50, 90)}
            print(f"{name}: {rows[name]['p50']} us ({rows[name]['p10']} to {rows[name]['p90']})")
        dist.destroy_process_group()
    sizes = {"tokens": TOKENS, "arrivals": LOCAL, "tensors": 2}
    result = {"date": now(), "provenance": provenance(), "device": device.type, **sizes, "microseconds": rows}
    write_result(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
