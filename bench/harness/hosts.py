"""Servers over several hosts: those besides this one, and this one as they reach it."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_eplb_affinity.domain.errors import InputError


@dataclass(frozen=True)
class OtherHosts:
    """``names`` as the remote shell knows them, ``dist_init_addr`` HOST:PORT; no others by default."""

    names: tuple[str, ...] = ()
    dist_init_addr: str = ""

    def __str__(self) -> str:
        return f" --other-hosts {','.join(self.names)} --dist-init-addr {self.dist_init_addr}" if self.names else ""


THIS_HOST = OtherHosts()


def other_hosts(names: str, dist_init_addr: str, ranks: int) -> OtherHosts:
    """From the values of --other-hosts and --dist-init-addr.

    Raises InputError unless there is an address exactly where there are names, and ``ranks`` divide over the hosts.
    """
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    _, colon, port = dist_init_addr.rpartition(":")
    if found and not (colon and port.isdigit()):
        raise InputError(f"--dist-init-addr {dist_init_addr!r}: --other-hosts {names} needs HOST:PORT of this host")
    if dist_init_addr and not found:
        raise InputError(f"--dist-init-addr {dist_init_addr}: without --other-hosts there is nobody to reach it")
    if ranks % (1 + len(found)):
        raise InputError(f"--other-hosts {names}: {ranks} ranks do not divide over {1 + len(found)} hosts")
    return OtherHosts(found, dist_init_addr)
