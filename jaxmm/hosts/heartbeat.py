"""Judge from heartbeats which host of a run is dead, failed or stuck."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

STATUS = 75
"""Exit status of a process that another host ended, or that was stuck: EX_TEMPFAIL, worth another try."""
LONG = 6
"""Factor on the timeout for phases that are not part of a step."""
SHORT = ("training", "reading data")
"""Phases of a step."""
ELSEWHERE = re.compile(r"gloo|nccl|unavailable|deadline_exceeded|cancelled|barrier|coordination|collective", re.I)
"""Messages of errors that may come from a host that is gone."""


@dataclass(frozen=True)
class Heartbeat:
    """The state that a host reports."""

    name: str
    beats: int = 0
    """Signs of life."""
    progress: int = 0
    """Signs of progress."""
    step: int = 0
    phase: str = "starting"
    blocking: bool = False
    """The host waits for its devices or for other hosts."""
    failed: str | None = None
    """An error that another host may have caused."""


@dataclass(frozen=True)
class HostStatus:
    """The last heartbeat of a host, and the times in seconds at which its parts were new."""

    heartbeat: Heartbeat
    alive: float
    moved: float
    failed: float | None = None

    def updated(self, heartbeat: Heartbeat, now: float) -> "HostStatus":
        """Return the status after `heartbeat` arrived at time `now`."""
        return HostStatus(heartbeat, now if heartbeat.beats != self.heartbeat.beats else self.alive,
                          now if heartbeat.progress != self.heartbeat.progress else self.moved,
                          None if heartbeat.failed is None else now if self.failed is None else self.failed)


@dataclass(frozen=True)
class Failure:
    """The reason why a run ends."""

    host: int
    name: str
    what: str
    """A line for people, printed after the host's name."""
    stuck: bool = False
    again: bool = True
    """Another try may succeed."""


def detect_failure(
    hosts: Sequence[HostStatus], now: float, *, timeout: float, heartbeat: float, interval: float
) -> Failure | None:
    """Return the host that ends the run, if any: a dead one, else one that failed, else one that the others wait for.

    If collectives failed, a host is most likely gone: then five missed heartbeats are enough.
    """
    suspicion = [host.failed for host in hosts if host.failed is not None]
    patience = min(heartbeat, 5 * interval) if suspicion else heartbeat
    silent = [i for i, host in enumerate(hosts) if now - host.alive > patience]
    if silent:
        index = min(silent, key=lambda i: hosts[i].alive)
        return dead(hosts, index, now, f"no sign of life for {now - hosts[index].alive:.0f} s")
    if suspicion and now - min(suspicion) > 2 * patience:
        index = min((i for i, host in enumerate(hosts) if host.failed is not None), key=lambda i: hosts[i].failed)
        return failure(hosts, index, now, f"failed: {hosts[index].heartbeat.failed}")

    def late(host: HostStatus) -> bool:
        return now - host.moved > timeout * (1 if host.heartbeat.phase in SHORT else LONG)

    stuck = [i for i, host in enumerate(hosts) if late(host) and not host.heartbeat.blocking]
    if not stuck and not all(late(host) and host.heartbeat.blocking for host in hosts):
        return None
    index = min(stuck or range(len(hosts)), key=lambda i: (hosts[i].heartbeat.step, hosts[i].moved))
    others = "" if stuck else ", like all others, which wait for each other or for devices"
    return replace(failure(hosts, index, now, f"is stuck{others}"), stuck=True)


def failure(hosts: Sequence[HostStatus], index: int, now: float, what: str) -> Failure:
    """Return the failure of host `index`, with what it was doing."""
    status = hosts[index]
    return Failure(index, status.heartbeat.name, f"{what}; last seen {status.heartbeat.phase} at step "
                   f"{status.heartbeat.step}, {now - status.moved:.0f} s ago")


def dead(hosts: Sequence[HostStatus], index: int, now: float, reason: str) -> Failure:
    """Return the failure of host `index`, which is not heard any more."""
    return failure(hosts, index, now, f"is dead or cut off: {reason}")


def caused_elsewhere(error: BaseException | None) -> bool:
    """Return whether `error`, or what caused it, may come from a host that is gone."""
    while error is not None:
        if (isinstance(error, (jax.errors.JaxRuntimeError, ValueError, RuntimeError, TimeoutError))
                and ELSEWHERE.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False
