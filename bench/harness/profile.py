"""Profiles: the small TOML files under bench/profiles/ that say what to serve and how to load it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.harness.arms import ARMS
from bench.harness.hosts import OtherHosts
from sglang_eplb_affinity.domain.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

POISSON = "poisson"
POISSON_SECONDS = 16
REQUESTS, PREFILL, DECODE = KINDS = ("requests", "prefill", "decode")
PROFILE_DIR = Path(__file__).parents[1] / "profiles"


@dataclass(frozen=True)
class ServerConfig:
    """How the server is started. ``flags`` go to every arm, ``eplb_flags`` to the arms that use EPLB."""

    # A path, a hub id, `tiny:NAME` (built on the spot for the CPU), `random:KEY=N,...` or `deepseek:KEY=N,...` (sizes
    # of a model without weights, see bench.gpu.random_moe and deepseek_shaped), or empty: --model must name one.
    model: str
    ranks: int
    nodes: int = 1  # more than 1 on a single host: emulated, the ranks are dealt out node by node
    emulated_nodes: int = 0  # with an emulated link, where nodes is 1; 0: each rank is a node
    engine: str = "cuda"  # `cpu`: SGLang's CPU engine as bench/engines/cpu_engine completes it
    # Arms with EPLB serve one map each, planned on this routing trace before the run: no rebalance falls into a row.
    plan_trace: str = ""
    pinned: bool = False  # schedulers, the rest of a server, and the load generator on cores of their own
    flags: tuple[str, ...] = ()
    eplb_flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 31100
    ready_timeout_s: float = 180.0
    # Between two starts of servers side by side: large dummy weights take some GB more while they are drawn.
    stagger_s: float = 0.0
    # A server over several hosts: the harness runs on the first, and starts the same command on the others through a
    # remote shell, in the same folder. ``dist_init_addr`` is HOST:PORT of the first, as the others reach it.
    other_hosts: tuple[str, ...] = ()
    dist_init_addr: str = ""
    remote_shell: tuple[str, ...] = ("ssh", "-tt", "-o", "BatchMode=yes")

    def value(self, flag: str) -> str | None:
        """What follows ``flag`` where it stands last, as a server takes it; None without it."""
        return dict(pairwise((*self.flags, *self.eplb_flags))).get(flag)

    def running(self, concurrency: int) -> int:
        """Of ``concurrency`` requests, those that run at once."""
        return min(concurrency, int(self.value("--max-running-requests") or concurrency))

    def held_back(self, concurrency: int) -> float:
        """Of ``concurrency`` requests, those that the flags keep waiting while others decode: what is beyond
        --max-running-requests, and what SGLang's prefill delayer collects for one pass."""
        running = self.running(concurrency)
        return concurrency - running + float(self.value("--prefill-delayer-queue-min-ratio") or 0) * running


@dataclass(frozen=True)
class LoadConfig:
    """What is sent. ``requests`` maps concurrency to the number of requests of a cell.

    ``prompts``: `sharegpt` for text, or `random-ids`, for models whose routing is forced so that text does not matter.
    ``input_tokens`` is [shortest, longest] prompt that is taken as it is; ``exact_input_tokens`` instead cuts and
    joins prompts to one length. ``output_tokens`` are what every request gets (end of sequence ignored), up to
    ``output_spread`` more or fewer, and the first of a closed loop fewer if it is to ``stagger`` (see
    bench.harness.workload). ``request_rate`` (requests/s) makes the
    load open (Poisson arrivals, at most the concurrency in flight); 0 is a closed loop. For ``slo_*`` (0: none) and
    ``stall_ms`` see bench.figures.steady.Targets.

    ``token_streams``: of a `decode` load, so many of its requests stream token by token and are what is measured; the
    others bring their first and their last tokens only. All streaming like that would measure the load generator.

    ``kind``: `requests`, or what a server of a disaggregated deployment does, in one wave without arrivals: `prefill`
    (one token out, so every pass is a full prefill) and `decode` (all requests decode together).
    ``blocks``: measured in the first so many blocks only; 0: in all.
    """

    requests: Mapping[int, int]
    output_tokens: int
    output_spread: int = 0
    kind: str = "requests"
    blocks: int = 0
    prompts: str = "sharegpt"
    input_tokens: tuple[int, int] = (4, 1024)
    exact_input_tokens: int = 0
    stagger: bool = False
    request_rate: float = 0.0
    token_streams: int = 0
    warmup_requests: int = 16
    warmup_rounds: int = 4
    cell_timeout_s: float = 600.0
    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    stall_ms: float = 50.0

    @property
    def concurrency(self) -> tuple[int, ...]:
        return tuple(sorted(self.requests))

    @property
    def lengths(self) -> str:
        """Tokens in and out, for a sentence."""
        prompt = str(self.exact_input_tokens) if self.exact_input_tokens else "{} to {}".format(*self.input_tokens)
        least, most = self.output_tokens - self.output_spread, self.output_tokens + self.output_spread
        return f"{prompt} tokens in, {least} to {most} out" if least < most else f"{prompt} tokens in, {most} out"

    def requests_at(self, concurrency: int) -> int:
        """Requests of a cell; between the profile's own points by interpolation, never fewer than 4 a slot."""
        if self.kind == DECODE:
            return concurrency
        known = self.concurrency
        if concurrency in self.requests:
            return self.requests[concurrency]
        between = float(np.interp(concurrency, known, [self.requests[c] for c in known]))
        return max(round(between), 4 * concurrency)

    def check(self, source: str) -> None:
        """Raise InputError, naming ``source``, for values that cannot be measured."""
        if not self.requests or min(*self.requests, *self.requests.values(), 1) < 1:
            raise InputError(f"{source} requests must be at least 1 at each concurrency of at least 1")
        if self.kind not in KINDS:
            raise InputError(f"{source} kind is {self.kind!r}, but must be one of {', '.join(KINDS)}")
        if self.prompts not in ("sharegpt", "random-ids"):
            raise InputError(f"{source} prompts is {self.prompts!r}, but must be sharegpt or random-ids")
        if self.kind != PREFILL and self.output_tokens < 4:
            raise InputError(f"{source} output_tokens must be at least 4")
        if self.output_spread and (self.kind == DECODE or not 0 < self.output_spread <= self.output_tokens - 4):
            raise InputError(
                f"{source} output_spread is {self.output_spread}, but must leave 4 of the {self.output_tokens} output "
                "tokens, and requests of a decode load end together"
            )
        if self.token_streams and (self.kind != DECODE or not 0 < self.token_streams <= min(self.requests)):
            raise InputError(
                f"{source} token_streams is {self.token_streams}, but must be a number of the requests of a decode load"
            )


@dataclass(frozen=True)
class Profile:
    name: str
    title: str
    server: ServerConfig
    load: LoadConfig
    loads: Mapping[str, LoadConfig] = field(default_factory=dict)  # further ones, by name, on the same servers
    arms: tuple[str, ...] = ("none", "vanilla", "affinity")
    blocks: int = 1
    seed: int = 1
    # All arms' servers start at once on the same GPUs and take turns; else one at a time, each for a whole block.
    arms_side_by_side: bool = False
    link: str = ""  # between nodes: the machine's own, or `emulatedN`: slowed down to N GB/s (see bench.harness.links)

    @staticmethod
    def named(name: str, directory: Path = PROFILE_DIR) -> Profile:
        """The profile of this name, or of this path when ``name`` ends in .toml."""
        path = Path(name) if name.endswith(".toml") else directory / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in directory.glob("*.toml")))
            raise InputError(f"--profile: {name!r} is neither a .toml file nor one of {known}")
        return Profile.parse(path.read_text(encoding="utf-8"), name=path.stem, source=str(path), directory=directory)

    @staticmethod
    def parse(text: str, *, name: str, source: str, directory: Path = PROFILE_DIR) -> Profile:
        """``directory``: where the profile's ``base`` is, if it has one."""
        data = _tables(text, source, directory)
        server = _build(ServerConfig, data.pop("server", {}), f"{source}: [server]")
        load = _load(data.pop("load", {}), f"{source}: [load]")
        loads = {name: _load(table, f"{source}: [loads.{name}]") for name, table in data.pop("loads", {}).items()}
        found = {"name": name, "title": name, "server": server, "load": load, "loads": loads, **data}
        profile: Profile = _build(Profile, found, source)
        profile._check(source)
        return profile

    def with_poisson(self, rate: float) -> Profile:
        """With one more load, `poisson`: the main one's requests, as many as at its largest concurrency but for at most
        POISSON_SECONDS, arriving at ``rate`` a second on average."""
        if not rate > 0:
            raise InputError(f"--rate: {rate:g} requests/s is not above 0")
        most = max(self.load.requests)
        count = min(self.load.requests[most], max(1, round(POISSON_SECONDS * rate)))
        load = replace(self.load, requests={most: count}, request_rate=rate, stagger=False)
        return replace(self, loads={**self.loads, POISSON: load})

    def load_named(self, name: str) -> LoadConfig:
        """The main load has no name."""
        return self.loads[name] if name else self.load

    def over(self, hosts: OtherHosts) -> Profile:
        """With its server over several hosts; each is a node, unless the profile says what nodes are."""
        nodes = self.server.nodes if self.server.nodes > 1 else 1 + len(hosts.names)
        server = replace(self.server, other_hosts=hosts.names, dist_init_addr=hosts.dist_init_addr, nodes=nodes)
        return replace(self, server=server)

    def _check(self, source: str) -> None:
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise InputError(f"{source}: arms has {unknown[0]!r}, but known arms are {', '.join(ARMS)}")
        if self.server.engine not in ("cpu", "cuda"):
            raise InputError(f"{source}: [server] engine is {self.server.engine!r}, but must be 'cpu' or 'cuda'")
        if self.server.ranks < 1 or self.server.nodes < 1 or self.server.ranks % self.server.nodes:
            raise InputError(f"{source}: [server] ranks = {self.server.ranks} must be a multiple of nodes")
        if self.server.emulated_nodes < 0 or self.server.ranks % (self.server.emulated_nodes or 1):
            raise InputError(f"{source}: [server] ranks = {self.server.ranks} must be a multiple of emulated_nodes")
        if self.server.other_hosts and ":" not in self.server.dist_init_addr:
            raise InputError(f"{source}: [server] other_hosts need dist_init_addr, HOST:PORT of the first host")
        for name, load in {"load": self.load, **{f"loads.{name}": load for name, load in self.loads.items()}}.items():
            load.check(f"{source}: [{name}]")
        if self.load.kind != REQUESTS:
            raise InputError(f"{source}: [load] kind is {self.load.kind!r}, but that of the main load is requests")
        if self.blocks < 1:
            raise InputError(f"{source}: blocks must be at least 1")

    def with_model(self, model: str | None) -> Profile:
        """This profile with the model of ``--model``; raises InputError when neither names one."""
        if model:
            return replace(self, server=replace(self.server, model=model))
        if not self.server.model:
            raise InputError(f"--model: profile {self.name!r} has no model of its own; give a path or a hub id")
        return self


def _tables(text: str, source: str, directory: Path) -> dict[str, Any]:
    """The tables of a profile. One with a ``base`` (the name of another) has what it does not say from there: the keys
    of [server] and [load] one by one, further loads whole, and flags that ``more_flags`` does not have.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: not TOML ({error})") from None
    base = data.pop("base", None)
    if base is None:
        return data
    path = directory / f"{base}.toml"
    if not path.is_file():
        raise InputError(f"{source}: base is {base!r}, but there is no {path.name} in {path.parent.name}/")
    found = _tables(path.read_text(encoding="utf-8"), str(path), directory)
    for name in ("server", "load", "loads"):
        data[name] = {**found.get(name, {}), **data.get(name, {})}
    server = data["server"]
    flags = {**_by_flag(server.get("flags", [])), **_by_flag(server.pop("more_flags", []))}
    server["flags"] = [part for flag, values in flags.items() for part in (flag, *values)]
    return {**found, **data}


def _by_flag(flags: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in flags:
        if part.startswith("--"):
            found[part] = values = []
        else:
            values.append(part)
    return found


def _load(table: Mapping[str, Any], source: str) -> LoadConfig:
    found = dict(table)
    try:
        found["requests"] = {int(key): int(value) for key, value in found["requests"].items()}
    except (KeyError, AttributeError, ValueError, TypeError):
        raise InputError(f"{source} requests must map requests in flight to those in all, as {{ 64 = 256 }}") from None
    return _build(LoadConfig, found, source)


T = TypeVar("T")


def _build(kind: type[T], table: Mapping[str, Any], source: str) -> T:
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - names):
        raise InputError(f"{source}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(names))}")
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}  # type: ignore[arg-type]
    if missing := sorted(needed - set(table)):
        raise InputError(f"{source}: {', '.join(missing)} missing")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return kind(**values)
