"""What differs between the SGLangs that this package works with, behind one interface.

A module for each version (``v0_5_17.py``, ``v0_5_23.py``) gives the functions of :class:`Adapter`; the other hooks ask
:func:`adapter` and know of no version.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from typing import Any, Protocol, cast

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks.server_arguments import ServerArguments

MODULES = {"0.5.17": "v0_5_17", "0.5.23": "v0_5_23"}


class Adapter(Protocol):
    def arguments_of(self, record: Any) -> ServerArguments:
        """SGLang's ServerArgs as the hooks know them: values read are resolved ones, assignments take effect."""

    def arguments(self) -> ServerArguments:
        """Those of this process, once SGLang has published them."""

    def dp_rank(self, model_runner: Any) -> int | None:
        """Of a data-parallel replica (not of data-parallel attention)."""

    def init_common(self, model_config: Any) -> dict[str, Any] | None:
        """``ExpertLocationMetadata._init_common``."""

    def tokens_of_pass(self, forward_batch: Any) -> int:
        """Real tokens of this rank's batch."""


@cache
def adapter() -> Adapter:
    """The adapter of the installed SGLang; raises InputError for another version, naming those known."""
    version = importlib.metadata.version("sglang")
    if version not in MODULES:
        raise InputError(f"SGLang {version}: this package works with {' and '.join(MODULES)}")
    return cast(Adapter, importlib.import_module(f"sglang_eplb_affinity.sglang_hooks.{MODULES[version]}"))
