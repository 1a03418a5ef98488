"""The arms of the comparison: what differs between two servers that get the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_eplb_affinity.domain.errors import InputError


@dataclass(frozen=True)
class Arm:
    """One way to place experts.

    ``uses_eplb`` adds the profile's EPLB flags (redundant experts, rebalance interval, dispatch rule) to the server
    command; ``flags`` come after them, so that an arm can differ in one of these. ``expects_rebalances``
    is the claim that the server log must prove, or the rows of this arm are void.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    uses_eplb: bool = False
    expects_rebalances: bool = False

    @property
    def only_observed(self) -> bool:
        """Whether the recorder only measures this arm's EPLB, which does without it."""
        return self.uses_eplb and self.recorded and "affinity" not in self.flags

    @property
    def recorded(self) -> bool:
        """Whether the server says what its rebalances moved and how balanced its placement is."""
        return _RECORDER in self.flags


# Lets the server measure the placement it serves with. An affinity server records all the time, since it plans on that;
# one with SGLang's EPLB the last tenth of the passes before each rebalance (on a CPU all); one without EPLB only while
# it is asked to, between measured rows.
_RECORDER = "--enable-expert-affinity-recorder"
_AFFINITY = ("--enable-eplb", "--eplb-algorithm", "affinity", _RECORDER)
_UNRECORDED = ("--enable-eplb", "--eplb-algorithm", "deepseek")
_VANILLA = (*_UNRECORDED, _RECORDER)

_ARMS = (
    Arm("none", "no EPLB", (_RECORDER,)),
    Arm("vanilla", "vanilla EPLB", _VANILLA, True, True),
    Arm("affinity", "affinity EPLB", _AFFINITY, True, True),
    # The same server twice: what differs between `vanilla` and `vanilla-again` is noise (the A/A floor).
    Arm("vanilla-again", "vanilla EPLB (A/A)", _VANILLA, True, True),
    # Paused beside other servers, a round may last longer than its limit allows.
    Arm("async", "affinity EPLB, async", (*_AFFINITY, "--eplb-async", "--eplb-async-phase-limit", "3600"), True, True),
    # Replicas chosen for the fewest GPUs a token. An arm of its own: the others share a rule that SGLang has too.
    Arm("cover", "affinity EPLB, cover", (*_AFFINITY, "--ep-dispatch-algorithm", "cover"), True, True),
    # Perfectly balanced routing without EPLB: what balance alone could gain. Its outputs are not the model's.
    Arm("balanced", "balanced routing", (_RECORDER, "--ep-forced-routing", "balanced")),
    # SGLang's EPLB as anybody runs it: `vanilla` pays a little for the recorder that tells its placement.
    Arm("vanilla-unrecorded", "vanilla EPLB, not recorded", _UNRECORDED, True, True),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
# Affinity served in another way: they are compared with `affinity` too.
VARIANTS = ("async", "cover")


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
