"""Which passes launch a recording kernel, without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import pytest

from sglang_eplb_affinity.device.recorder import RecordSchedule, one_group
from sglang_eplb_affinity.sglang_hooks import recording
from sglang_eplb_affinity.sglang_hooks.settings import RecordingSettings


class Passes:
    """A recorder that keeps what each pass begins with."""

    num_layers = 2

    def __init__(self) -> None:
        self.begun: list[bool] = []
        self.phases: list[int] = []

    def begin_pass(self, tokens: list[int], phase: int, record: bool) -> None:
        self.begun.append(record)
        self.phases.append(phase)


@pytest.fixture
def server_recorder() -> recording.ServerRecorder:
    found = object.__new__(recording.ServerRecorder)
    found._reduction = SimpleNamespace(contributes=True)  # type: ignore[assignment]
    found._owner = SimpleNamespace(records_affinity_now=lambda: True)
    found._schedule, found._passes, found._num_groups, found._part = RecordSchedule(every=2), 0, 1, 0
    found.recorder = Passes()  # type: ignore[assignment]
    found._records_pass, found._on_cuda = True, False
    found._records_phase = RecordingSettings().records_phase
    return found


def begin(found: recording.ServerRecorder, *, extend: bool = True, verify: bool = False) -> None:
    mode = SimpleNamespace(is_extend=lambda: extend, is_target_verify=lambda: verify)
    found.on_forward_pass_start(
        SimpleNamespace(forward_mode=mode, num_token_non_padded_cpu=3, global_num_token_non_padded_cpu=3)
    )


def test_a_pass_that_does_not_count_launches_nothing(server_recorder: recording.ServerRecorder) -> None:
    launched = []
    for _ in range(4):
        begin(server_recorder)
        launched.append(server_recorder.rows_to_record(0, 3))
    assert server_recorder.recorder.begun == [True, False, True, False]  # type: ignore[attr-defined]
    assert launched == [one_group(3), None, one_group(3), None]


@pytest.mark.parametrize(("phase", "recorded"), [("prefill", [True, False]), ("decode", [False, True])])
def test_passes_of_another_phase_launch_nothing(
    server_recorder: recording.ServerRecorder, phase: Literal["prefill", "decode"], recorded: list[bool]
) -> None:
    server_recorder._schedule = RecordSchedule()
    server_recorder._records_phase = RecordingSettings(phase=phase).records_phase
    launched = []
    for extend in (True, False):
        begin(server_recorder, extend=extend)
        launched.append(server_recorder.rows_to_record(0, 3) is not None)
    assert launched == server_recorder.recorder.begun == recorded  # type: ignore[attr-defined]


def test_a_captured_pass_always_records(server_recorder: recording.ServerRecorder, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    begin(server_recorder)
    begin(server_recorder)
    assert server_recorder.rows_to_record(0, 3) is None
    server_recorder._on_cuda = True
    monkeypatch.setattr(recording.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert server_recorder.rows_to_record(0, 3) == one_group(3)
    monkeypatch.setattr(recording.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(recording.torch.compiler, "is_compiling", lambda: True)
    assert server_recorder.rows_to_record(0, 3) == one_group(3)


def test_verifying_speculated_tokens_is_decode(server_recorder: recording.ServerRecorder) -> None:
    """SGLang counts TARGET_VERIFY among the modes that extend."""
    for extend, verify in ((True, False), (True, True), (False, False)):
        begin(server_recorder, extend=extend, verify=verify)
    assert server_recorder.recorder.phases == [0, 1, 1]  # type: ignore[attr-defined]
