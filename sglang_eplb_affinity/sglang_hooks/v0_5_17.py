"""The adapter of SGLang 0.5.17 (see adapter.py): one mutable ServerArgs holds raw and resolved values."""

from __future__ import annotations

from typing import Any


def arguments_of(record: Any) -> Any:
    return record


def arguments() -> Any:
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def dp_rank(model_runner: Any) -> int | None:
    rank: int | None = model_runner.ps.dp_rank
    return rank


def init_common(arguments: Any, model_config: Any) -> dict[str, Any] | None:
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    common: dict[str, Any] | None = ExpertLocationMetadata._init_common(arguments, model_config)
    return common


def tokens_of_pass(forward_batch: Any) -> int:
    tokens = forward_batch.num_token_non_padded_cpu
    return len(forward_batch.input_ids) if tokens is None else int(tokens)
