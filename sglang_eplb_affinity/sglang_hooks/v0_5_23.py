"""The adapter of SGLang 0.5.23 (see adapter.py): a record of what was given, and declared resolutions over it."""

from __future__ import annotations

from typing import Any


class Arguments:
    """ServerArgs as 0.5.17 has it: resolved values are read, assignments become declarations."""

    __slots__ = ("_record",)

    def __init__(self, record: Any) -> None:
        object.__setattr__(self, "_record", record)

    def __getattr__(self, name: str) -> Any:
        from sglang.srt.arg_groups.overrides import resolving_view

        view = resolving_view(object.__getattribute__(self, "_record"))
        if name == "enable_expert_distribution_metrics":
            return view.expert_balancedness_report_mode not in (None, "off")
        if name == "enable_dp_attention":
            return view.attn_dp_size > 1
        if name == "dp_size":  # with data-parallel attention 0.5.23 calls it attn_dp_size, and dp_size is 1
            return view.dp_size * view.attn_dp_size
        return getattr(view, name)

    def __setattr__(self, name: str, value: Any) -> None:
        from sglang.srt.arg_groups.overrides import declare_resolution

        declare_resolution(self._record, "eplb_affinity", **{name: value})

    def get_model_config(self) -> Any:
        from sglang.srt.arg_groups.overrides import model_config_of

        return model_config_of(self._record)


def arguments_of(record: Any) -> Any:
    return Arguments(record)


def arguments() -> Any:
    from sglang.srt.runtime_context import get_server_args

    return Arguments(get_server_args())


def dp_rank(model_runner: Any) -> int | None:
    from sglang.srt.runtime_context import get_parallel

    rank: int | None = get_parallel().dp_rank
    return rank


def init_common(model_config: Any) -> dict[str, Any] | None:
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    common: dict[str, Any] | None = ExpertLocationMetadata._init_common(model_config)
    return common


def tokens_of_pass(forward_batch: Any) -> int:
    tokens = forward_batch.global_num_token_non_padded_cpu
    return len(forward_batch.input_ids) if tokens is None else int(tokens)
