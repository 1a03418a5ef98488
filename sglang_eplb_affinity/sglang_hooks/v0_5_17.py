"""The adapter of SGLang 0.5.17 (see adapter.py): one mutable ServerArgs, with a view of what is resolved so far."""

from __future__ import annotations

from typing import Any


class Arguments:
    """ServerArgs with its resolved values read, and its fields assigned."""

    __slots__ = ("_record",)

    def __init__(self, record: Any) -> None:
        object.__setattr__(self, "_record", record)

    def __getattr__(self, name: str) -> Any:
        record = object.__getattribute__(self, "_record")
        return getattr(record._resolved(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._record, name, value)

    def get_model_config(self) -> Any:
        return self._record.get_model_config()


def arguments_of(record: Any) -> Any:
    return Arguments(record)


def arguments() -> Any:
    from sglang.srt.runtime_context import get_server_args

    return Arguments(get_server_args())


def dp_rank(model_runner: Any) -> int | None:
    rank: int | None = model_runner.ps.dp_rank
    return rank


def init_common(model_config: Any) -> dict[str, Any] | None:
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata
    from sglang.srt.runtime_context import get_server_args

    common: dict[str, Any] | None = ExpertLocationMetadata._init_common(get_server_args(), model_config)
    return common


def tokens_of_pass(forward_batch: Any) -> int:
    tokens = forward_batch.num_token_non_padded_cpu
    return len(forward_batch.input_ids) if tokens is None else int(tokens)
