"""The arms of the comparison: what differs between two servers that get the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang_eplb_affinity.domain.errors import InputError

# Lets the server measure the placement it serves with. An affinity server records all the time, since it plans on that;
# one with SGLang's EPLB the last tenth of the passes before each rebalance (on a CPU all); one without EPLB only while
# it is asked to, between measured rows.
RECORDER = "--enable-expert-affinity-recorder"
RULE = "--ep-dispatch-algorithm"
REDUNDANT = "--ep-num-redundant-experts"
NEVER = ("--eplb-rebalance-num-iterations", "100000000")


@dataclass(frozen=True)
class Arm:
    """One way to place experts.

    ``algorithm`` plans (None: no EPLB), and adds the profile's EPLB flags (redundant experts, rebalance interval,
    dispatch rule) to the server command; ``dispatch``, ``redundant``, ``further_slots``, ``primary_tokens`` and
    ``own_flags`` come after them, so that an arm can differ in one of these. A map is planned for ``planned_for``, if
    that is not ``dispatch``. ``environment``: variables of its server. ``recorded``: whether the
    server says what its rebalances moved and how balanced its placement is. ``rebalances``: what an arm with EPLB
    claims, which the server log must prove, or its rows are void.
    """

    name: str
    title: str
    algorithm: str | None = None
    recorded: bool = True
    dispatch: str | None = None
    redundant: int | None = None
    further_slots: int = 0
    primary_tokens: int | None = None
    planned_for: str | None = None
    own_flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    rebalances: Literal["in every row", "at times", "never"] = "in every row"

    @property
    def uses_eplb(self) -> bool:
        return self.algorithm is not None

    @property
    def expects_rebalances(self) -> bool:
        return self.uses_eplb and self.rebalances == "in every row"

    @property
    def may_rebalance(self) -> bool:
        return self.uses_eplb and self.rebalances != "never"

    @property
    def only_observed(self) -> bool:
        """Whether the recorder only measures this arm's EPLB, which does without it."""
        return self.uses_eplb and self.recorded and self.algorithm != "affinity"

    @property
    def flags(self) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        found += ("--enable-eplb", "--eplb-algorithm", self.algorithm) if self.algorithm else ()
        found += (RECORDER,) if self.recorded else ()
        found += (RULE, self.dispatch) if self.dispatch else ()
        found += (REDUNDANT, str(self.redundant)) if self.redundant is not None else ()
        found += ("--eplb-affinity-further-slots", str(self.further_slots)) if self.further_slots else ()
        tokens = self.primary_tokens
        found += ("--eplb-affinity-primary-tokens", str(tokens)) if tokens is not None else ()
        return (*found, *self.own_flags)


# Rounds that move experts without need. Paused beside other servers, one may last longer than its limit allows.
_NEEDLESS = ("--eplb-async", "--eplb-async-phase-limit", "3600", "--eplb-min-gain", "0")


def _in_mode(mode: str, chunk: int) -> tuple[str, ...]:
    """Low-latency mode also prefills through its small buffer; the others take whole prompts."""
    return (*NEVER, "--deepep-mode", mode, "--chunked-prefill-size", str(chunk))


_ARMS = (
    Arm("none", "no EPLB"),
    Arm("vanilla", "vanilla EPLB", "deepseek"),
    Arm("affinity", "affinity EPLB", "affinity"),
    # The same server twice: what differs between `vanilla` and `vanilla-again` is noise (the A/A floor).
    Arm("vanilla-again", "vanilla EPLB (A/A)", "deepseek"),
    # Paused beside other servers, a round may last longer than its limit allows.
    Arm(
        "async",
        "affinity EPLB, async",
        "affinity",
        own_flags=("--eplb-async", "--eplb-async-phase-limit", "3600"),
    ),
    # Replicas chosen for the fewest GPUs a token. An arm of its own: the others share a rule that SGLang has too.
    Arm("cover", "affinity EPLB, cover", "affinity", dispatch="cover"),
    # Perfectly balanced routing without EPLB: what balance alone could gain. Its outputs are not the model's.
    Arm("balanced", "balanced routing", own_flags=("--ep-forced-routing", "balanced")),
    # As balanced, and each token on all GPUs, or on one: what fan-out costs at the same balance.
    Arm("balanced-spread", "balanced routing, spread", own_flags=("--ep-forced-routing", "balanced:spread")),
    Arm("balanced-local", "balanced routing, local", own_flags=("--ep-forced-routing", "balanced:local")),
    # SGLang's EPLB as anybody runs it: `vanilla` pays a little for the recorder that tells its placement.
    Arm("vanilla-unrecorded", "vanilla EPLB, not recorded", "deepseek", recorded=False),
    # What EPLB costs while it rearranges nothing, and with rounds beside serving that move experts without need.
    Arm("vanilla-idle", "vanilla EPLB, idle", "deepseek", recorded=False, own_flags=NEVER, rebalances="never"),
    Arm("affinity-idle", "affinity EPLB, idle", "affinity", recorded=False, own_flags=NEVER, rebalances="never"),
    Arm("plain", "no EPLB, not recorded", recorded=False),
    Arm(
        "async-needless",
        "affinity EPLB, async, moving without need",
        "affinity",
        own_flags=_NEEDLESS,
        rebalances="at times",
    ),
    # After each round it proves that every slot holds what the map says; that stops serving, so it is not compared.
    Arm(
        "async-verified",
        "affinity EPLB, async, weights proven",
        "affinity",
        own_flags=_NEEDLESS,
        environment=(("EPLB_AFFINITY_VERIFY", "1"),),
        rebalances="at times",
    ),
    # One server in each of DeepEP's modes.
    Arm(
        "auto-idle",
        "auto mode, idle",
        "affinity",
        recorded=False,
        own_flags=_in_mode("auto", 16384),
        rebalances="never",
    ),
    Arm(
        "normal-idle",
        "normal mode, idle",
        "affinity",
        recorded=False,
        own_flags=_in_mode("normal", 16384),
        rebalances="never",
    ),
    Arm(
        "low-latency-idle",
        "low-latency mode, idle",
        "affinity",
        recorded=False,
        own_flags=_in_mode("low_latency", 512),
        rebalances="never",
    ),
    # Replicas chosen for few GPUs a token and for even loads within the pass.
    Arm("cover-balanced", "affinity EPLB, balanced cover", "affinity", dispatch="cover_balanced"),
    # One slot an expert: what decode would take if no replica were read.
    Arm("affinity-0", "affinity EPLB, none redundant", "affinity", redundant=0),
    # Half of the experts of the small models twice, against traffic.
    Arm("cover-32", "affinity EPLB, cover, 32 redundant", "affinity", dispatch="cover", redundant=32),
    Arm(
        "cover-balanced-32",
        "affinity EPLB, balanced cover, 32 redundant",
        "affinity",
        dispatch="cover_balanced",
        redundant=32,
    ),
    # One active slot an expert in decode, balanced cover in prefill.
    Arm("primary", "affinity EPLB, primary slots", "affinity", dispatch="primary"),
    Arm("primary-32", "affinity EPLB, primary slots, 32 redundant", "affinity", dispatch="primary", redundant=32),
    Arm(
        "primary-32-further",
        "affinity EPLB, primary and 8 further slots a GPU, 32 redundant",
        "affinity",
        dispatch="primary",
        redundant=32,
        further_slots=8,
    ),
    # Balanced cover in prefill, static in decode, on a map for the latter: affinity's default over nodes in auto mode.
    Arm("by-phase", "affinity EPLB, by phase", "affinity", dispatch="primary", primary_tokens=0, planned_for="static"),
    Arm(
        "by-phase-32",
        "affinity EPLB, by phase, 32 redundant",
        "affinity",
        dispatch="primary",
        redundant=32,
        primary_tokens=0,
        planned_for="static",
    ),
    Arm("vanilla-primary", "vanilla EPLB, primary slots", "deepseek", dispatch="primary"),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
# Affinity served in another way: they are compared with `affinity` too.
VARIANTS = tuple(arm.name for arm in _ARMS if arm.algorithm == "affinity" and arm.name != "affinity")


def map_flags(arm: Arm, path: Path | None) -> tuple[str, ...]:
    """What an arm gets instead of its flags to serve the map of ``path`` as it is (None: an arm without EPLB).

    Affinity stays on, with all that it does in a pass, and never rearranges. Of SGLang's EPLB only the map is served,
    without recording, in its favour: it has no recorder for DeepEP's auto mode but one that costs decode some percent.
    """
    flags = tuple(flag for flag in arm.flags if flag != RECORDER)
    if path is None:
        return flags
    if arm.algorithm == "affinity":
        return (*flags, *NEVER, "--init-expert-location", str(path))
    on = flags.index("--enable-eplb")
    return (*flags[:on], *flags[on + 3 :], "--init-expert-location", str(path))


def arms_named(names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of these names, in this order; raises InputError for an unknown or repeated name."""
    if not names:
        raise InputError(f"--arms: no arm named; choose from {', '.join(ARMS)}")
    for name in names:
        if name not in ARMS:
            raise InputError(f"--arms: unknown arm {name!r}; choose from {', '.join(ARMS)}")
    if len(set(names)) != len(names):
        raise InputError(f"--arms: {','.join(names)} names an arm twice")
    return tuple(ARMS[name] for name in names)
