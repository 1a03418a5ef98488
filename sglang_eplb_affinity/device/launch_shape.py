"""How a launch of map_and_record_kernel.py is cut into programs; `bench.gpu.kernel_tuning` measures which is best."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_eplb_affinity.dispatch.rules import COVER_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError

THREADS_OF_WARP = 32


@dataclass(frozen=True)
class LaunchShape:
    """``block``: (row, column) items of a program, or whole rows for `cover`; a power of 2, and for `cover` no fewer
    than the program has threads. ``count_in_program``: counts are added up in the program before they are added to the
    expert's, because many tokens queue for a hot expert's. ``lanes``, for `cover`: items as well, a thread of the one
    warp each, with columns padded to a power of 2.
    """

    block: int
    num_warps: int
    count_in_program: bool = False
    lanes: bool = False

    @property
    def max_registers(self) -> int:
        """Of a thread, so that a program fits the 65536 of a multiprocessor."""
        return min(255, 65536 // (self.num_warps * THREADS_OF_WARP))

    def check(self, rule: DispatchRule | None) -> None:
        """Raises InputError for a shape that the kernel cannot run with."""
        for name, number in (("block", self.block), ("num_warps", self.num_warps)):
            if number < 1 or number & (number - 1):
                raise InputError(f"launch shape: {name} {number} is not a power of 2")
        threads = self.num_warps * THREADS_OF_WARP
        if self.lanes:
            if rule not in COVER_RULES or self.block != threads or self.num_warps != 1:
                raise InputError(
                    f"launch shape: lanes are for `cover`, in one warp of {THREADS_OF_WARP} items, not for "
                    f"{rule or 'recording alone'} in {self.num_warps} of {self.block}"
                )
            return
        if rule in COVER_RULES and self.block < threads:
            raise InputError(
                f"launch shape: `cover` needs a row for each thread, but {self.block} are fewer than {threads}"
            )


@dataclass(frozen=True)
class LaunchShapes:
    """Shapes by the size of a pass: ``many`` from ``many_items`` (rows times top-k) on, else ``few``.

    ``one_program_rows``, for `cover_balanced`: so many rows are one program, a thread for each, and one launch.
    """

    few: LaunchShape
    many: LaunchShape
    many_items: int = 16384
    one_program_rows: int = 0

    def of(self, num_rows: int, top_k: int) -> LaunchShape:
        """``few`` with lanes only where a token's columns fit a warp."""
        if num_rows <= self.one_program_rows:
            block = max(THREADS_OF_WARP, 1 << (num_rows - 1).bit_length())
            return LaunchShape(block, block // THREADS_OF_WARP)
        items = num_rows * top_k
        fits = not self.few.lanes or top_k <= self.few.block
        return self.few if items < self.many_items and fits else self.many


# The fastest of bench.gpu.kernel_tuning on an H100 at 256 experts and top-8, or within its noise of it.
_ITEMS = LaunchShapes(LaunchShape(32, 1), LaunchShape(512, 4, count_in_program=True))
_COVER = LaunchShapes(LaunchShape(32, 1, lanes=True), LaunchShape(64, 2, count_in_program=True))
_BALANCED = LaunchShapes(_COVER.few, _COVER.many, one_program_rows=8)


def default_shapes(rule: DispatchRule | None) -> LaunchShapes:
    """Large passes of `cover` are launched by rows, all others by (row, column) items."""
    if rule == "cover_balanced":
        return _BALANCED
    return _COVER if rule == "cover" else _ITEMS
