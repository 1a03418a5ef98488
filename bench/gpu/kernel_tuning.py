"""`python -m bench.gpu.kernel_tuning`: the fastest launch shape of the mapping kernel for each rule and pass size.

Every shape is first checked on the GPU against the torch reference, bit for bit, then timed as `bench.gpu.kernel_times`
does it: in a CUDA graph of many layers. What it finds goes into :func:`launch_shape.default_shapes`. `unrecorded` is
the default shape without counts and sample: what is left of a time is what mapping alone costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch

from bench.gpu.flags import need_gpus
from bench.gpu.kernel_times import LAYERS, TOKENS, Cell, empty_kernel, measure_graph
from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_file, write_result
from sglang_eplb_affinity.device.launch_shape import LaunchShape, LaunchShapes, default_shapes
from sglang_eplb_affinity.device.recorder import RowLayout
from sglang_eplb_affinity.dispatch.rules import COVER_RULES, KERNEL_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError

_ITEM_SHAPES = (
    LaunchShape(32, 1), LaunchShape(128, 1), LaunchShape(64, 2), LaunchShape(128, 4), LaunchShape(256, 8),
    LaunchShape(256, 4, True), LaunchShape(512, 4, True), LaunchShape(1024, 8, True), LaunchShape(2048, 8, True),
)  # fmt: skip
_ROW_SHAPES = (
    LaunchShape(32, 1, lanes=True), LaunchShape(32, 1, True, lanes=True),
    LaunchShape(32, 1), LaunchShape(64, 2), LaunchShape(128, 4),
    LaunchShape(32, 1, True), LaunchShape(64, 2, True), LaunchShape(128, 4, True), LaunchShape(256, 8, True),
)  # fmt: skip
# A shape must beat the default by more than this part to be called better: less is noise.
NOISE = 0.02


def shapes_to_try(rule: DispatchRule) -> tuple[LaunchShape, ...]:
    return _ROW_SHAPES if rule in COVER_RULES else _ITEM_SHAPES


def label(shape: LaunchShape) -> str:
    counted, lanes = "+" if shape.count_in_program else "", " lanes" if shape.lanes else ""
    return f"{shape.block}/{shape.num_warps}{counted}{lanes}"


def best_shape(times: Mapping[LaunchShape, float], default: LaunchShape) -> LaunchShape:
    """The fastest, or the default unless another is faster by more than the noise."""
    fastest = min(times, key=lambda shape: (times[shape], shape.block))
    return fastest if default not in times or times[fastest] < times[default] * (1 - NOISE) else default


def differs(cell: Cell, rule: DispatchRule, shapes: LaunchShapes) -> str | None:
    """What a pass of three layers leaves that is not as the torch reference's: `ids`, `counts`, `sample`, or None."""
    rows, tables = RowLayout((cell.tokens,)), cell.tables(rule)
    ours, reference = cell.step(shapes), cell.step()
    assert ours.recorder is not None and reference.recorder is not None
    for layer in (0, 1, LAYERS - 1):
        found, expected = cell.original[layer].clone(), cell.original[layer].clone()
        ours(layer, found, rows, tables[layer], cell.valid)
        reference.reference(layer, expected, rows, tables[layer], cell.valid)
        if not torch.equal(found, expected):
            return "ids"
    if not torch.equal(ours.recorder.counts, reference.recorder.counts):
        return "counts"
    return None if torch.equal(ours.recorder.sample(), reference.recorder.sample()) else "sample"


def tune(cell: Cell, rule: DispatchRule) -> dict[str, object]:
    """Graph times of every shape at one size, us; raises InputError where a shape does not do as the reference."""
    times = {}
    for shape in shapes_to_try(rule):
        shapes = LaunchShapes(shape, shape)
        wrong = differs(cell, rule, shapes)
        if wrong is not None:
            raise InputError(f"{rule}, {cell.tokens} tokens, shape {label(shape)}: {wrong} unlike the reference's")
        times[shape] = measure_graph(cell.ours(rule, cell.step(shapes)), cell.restore)["median"]
    default = default_shapes(rule).of(cell.tokens, cell.top_k)
    unrecorded = cell.ours(rule, cell.step(recorded=False))
    return {
        "rule": rule,
        "tokens": cell.tokens,
        "default": label(default),
        "best": label(best_shape(times, default)),
        "us": {label(shape): time for shape, time in times.items()},
        "unrecorded_us": measure_graph(unrecorded, cell.restore)["median"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernel_tuning", description=__doc__)
    parser.add_argument("--out", type=result_file, help="result file (JSON)")
    parser.add_argument("--experts", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rule", action="append", choices=KERNEL_RULES, help="this rule only; may be repeated")
    options = parser.parse_args(arguments)
    found = []
    try:
        need_gpus("bench.gpu.kernel_tuning")
        with torch.inference_mode():
            for tokens in TOKENS:
                cell = Cell(tokens, options.experts, options.top_k)
                empty = measure_graph(empty_kernel(), cell.restore)["median"]
                print(f"{tokens} tokens, {options.experts} experts, top-{options.top_k}; empty {empty} us", flush=True)
                for rule in options.rule or KERNEL_RULES:
                    row = tune(cell, rule)
                    found.append({**row, "empty_us": empty})
                    print(
                        "  {rule}: best {best} (default {default}), unrecorded {unrecorded_us}; {us}".format(**row),
                        flush=True,
                    )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.out is not None:
        result = {"date": now(), "provenance": provenance(), "experts": options.experts, "top_k": options.top_k}
        write_result(options.out, {**result, "sizes": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
