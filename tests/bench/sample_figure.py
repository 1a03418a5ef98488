"""A summary figure as commands write it."""

from bench.publish.summary import Figure

FIGURE = Figure(
    name="bench.cpu.qps_ratio_to_vanilla",
    value=1.02,
    lower=0.98,
    upper=1.06,
    unit="ratio",
    kind="measured",
    hardware="2 cores",
    versions={"sglang": "0.5.17"},
    commit="abcdef1",
    date="2026-11-21",
    command="make bench",
)
