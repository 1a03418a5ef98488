"""What our hooks make of SGLang's own objects, without a server: prints one line of findings."""

import json


def low_latency_passes() -> list[bool]:
    """Whether a pass that extends, and one that decodes, are known as one of low-latency mode under DeepEP's `auto`."""
    from types import SimpleNamespace

    from sglang.srt.layers.dp_attention import set_is_extend_in_batch

    from sglang_eplb_affinity.sglang_hooks import topk_step

    asks = topk_step.low_latency_passes(SimpleNamespace(table_rule="primary", dispatch_mode="auto"))  # type: ignore[arg-type]
    found = []
    for extends in (True, False):  # as SGLang says it before each pass, and while it captures decode graphs
        set_is_extend_in_batch(extends)
        found.append(asks())
    return found


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from tests.server import check_draft_weights, check_gone_ranks, check_parts_of_pass

    print(
        "RESULT "
        + json.dumps(
            {
                "draft": check_draft_weights.findings(),
                "parts": check_parts_of_pass.findings(),
                "gone": check_gone_ranks.findings(),
                "low latency": low_latency_passes(),
            }
        )
    )


if __name__ == "__main__":
    main()
