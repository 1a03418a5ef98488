"""What more redundant experts would take of each GPU: a line of the log at start-up."""

from __future__ import annotations

from typing import Any

from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.server_arguments import ServerArguments


def advice(args: ServerArguments, shape: MoeShape, hf_config: Any) -> str | None:
    """None where no GPU can hold more experts, or the size of one is not in ``hf_config``.

    An expert is gate, up and down projections; weights are taken as of two bytes.
    """
    hidden = getattr(hf_config, "hidden_size", None)
    width = getattr(hf_config, "moe_intermediate_size", None) or getattr(hf_config, "intermediate_size", None)
    slots = (shape.num_experts + args.ep_num_redundant_experts) // args.ep_size
    if not isinstance(hidden, int) or not isinstance(width, int) or slots >= shape.num_experts:
        return None
    megabytes = 3 * hidden * width * 2 / 1e6
    gigabytes = megabytes * len(shape.moe_layers) / 1e3
    return (
        f"{args.ep_num_redundant_experts} redundant experts; {args.ep_size} more, a slot on each GPU, take "
        f"{gigabytes:.2g} GB of each in 16 bits (half in FP8). `python -m sglang_eplb_affinity plan --redundant auto "
        f"--memory-gb GB --expert-mb {megabytes:.3g}` says of a recording how many pay"
    )
