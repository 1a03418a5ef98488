"""Compiling kernels: cached on disk where the cache directory can be written, without the GIL, no fast-math."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
from numba.core import types
from numba.extending import intrinsic

logger = logging.getLogger(__name__)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.njit`` that releases the GIL and caches its machine code.

    numba refuses ``cache=True`` where neither ``__pycache__`` nor the user's cache directory is writable (a read-only
    container); the kernel is then compiled once per process, and the log says so.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        logger.warning(
            "eplb affinity: kernels compile at every start, no cache can be written (%s); set NUMBA_CACHE_DIR", error
        )
        return numba.njit(nogil=True)(function)


@intrinsic
def popcount(typingctx, word):  # type: ignore[no-untyped-def]
    """Number of set bits of a uint64, as int64 (LLVM's ctpop)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@intrinsic
def lowest_bit(typingctx, word):  # type: ignore[no-untyped-def]
    """Index of the lowest set bit of a uint64, as int64; 64 where there is none (LLVM's cttz)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], context.get_constant(types.boolean, False))

    return types.int64(types.uint64), codegen
