"""The replayed day as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.simulate.replay import DayResult

_HEADER = (
    "policy", "rebalance every", "rebalances", "balancedness", "pass load", "GPU fan-out", "node fan-out", "moved GB",
    "stall s", "step ms", "step ms with stalls", "against no EPLB",
)  # fmt: skip


def interval_text(result: DayResult) -> str:
    every = result.policy.every
    if every == 0:
        return "never"
    return "once" if every < 0 else f"{every * result.window_minutes:.0f} min"


def day_table(results: Sequence[DayResult]) -> str:
    """Markdown; the gain is of the step time with stalls, against the policy that never rebalances."""
    base = next(result for result in results if result.policy.name == "none").effective_step_ms
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    for r in results:
        gain = 100 * (1 - r.effective_step_ms / base)
        cells = (
            r.policy.name, interval_text(r), f"{r.total('rebalanced'):.0f}", f"{r.mean('balancedness'):.3f}",
            f"{r.mean('pass_load_max_over_mean'):.3f}",
            f"{r.mean('gpu_fanout'):.2f}", f"{r.mean('node_fanout'):.2f}", f"{r.total('moved_gigabytes'):.0f}",
            f"{r.total('stall_s'):.1f}", f"{r.mean('step_ms'):.1f}", f"{r.effective_step_ms:.1f}", f"{gain:+.1f} %",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_day(results: Sequence[DayResult], head: dict[str, Any], folder: Path) -> Path:
    """Balancedness, fan-out, step time and moved bytes over the hours, at the shortest and longest interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positive = [r.policy.every for r in results if r.policy.every > 0]
    shown = [r for r in results if r.policy.every in (0, min(positive), max(positive))]
    figure, axes = plt.subplots(4, 1, figsize=(9, 11), sharex=True)
    for axis, name, label in zip(
        axes, ("balancedness", "gpu_fanout", "step_ms", "moved_gigabytes"),
        ("balancedness (mean / max load)", "GPU fan-out", "step ms", "moved GB"), strict=True,
    ):  # fmt: skip
        for result in shown:
            hours = [window.hour for window in result.windows]
            values = [getattr(window, name) for window in result.windows]
            axis.plot(hours, values, label=f"{result.policy.name}, {interval_text(result)}", linewidth=1.1)
        axis.set_ylabel(label)
    axes[0].set_title(
        f"{head['system']}, {head['gpus']} GPUs, {head['phase']}: simulated day\n{head['routing']}", fontsize=9
    )
    axes[-1].set_xlabel("hour")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path = folder / f"replay-{head['system']}-{head['phase']}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
