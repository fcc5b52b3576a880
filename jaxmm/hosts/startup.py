"""Start the processes of a run, one or several on each machine: find each other, wait for each other, end together.

TPU pods, SLURM, Open MPI and Kubernetes are recognised as JAX does it; elsewhere `HostsConfig` says who is who. What a
host reports with `heartbeat` is judged by `jaxmm.hosts.supervisor`.
"""

import contextlib
import itertools
import json
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmm.hosts import clusters
from jaxmm.hosts.heartbeat import caused_elsewhere
from jaxmm.hosts.supervisor import Link, fork_supervised
from jaxmm.saved_config import differences
from jaxmm.validation import POSITIVE, ConfigError, Limit, check_types, require

FILE_TIMEOUT = 70.0
"""Seconds until a file of one host appears on another; NFS caches a folder for up to 60."""


SECONDS = Limit("a positive number of seconds", lambda value: 0 < value < math.inf)


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """The processes that train together. On a TPU pod, under SLURM, Open MPI and in an indexed Job of Kubernetes the
    defaults do."""

    address: str | None = None
    """HOST:PORT of the first process, for a cluster that is not recognised; needs `count` and `index` too."""
    count: Annotated[int | None, POSITIVE] = None
    """Number of processes. Without `address`, the run refuses to start if the cluster reports another number."""
    index: int | None = None
    """Number of this process, from 0."""
    alone: bool = False
    """Do not look for others, whatever cluster this is."""
    timeout: Annotated[float, SECONDS] = 300.0
    """Seconds without progress after which a host counts as stuck, and all end; six times as long while it compiles,
    evaluates, or reads or writes a checkpoint."""
    heartbeat: Annotated[float, SECONDS] = 60.0
    """Seconds without a sign of life after which a host counts as dead, and all end."""

    def __post_init__(self):
        """Check that either all fields are given or none."""
        check_types(self, "hosts")
        if self.alone:
            for name in ("address", "count", "index"):
                require(getattr(self, name) is None, f"hosts.{name}", getattr(self, name), "nothing with hosts.alone")
        elif self.address is None:
            require(self.index is None, "hosts.index", self.index, "hosts.address and hosts.count with it")
        else:
            host, _, port = self.address.rpartition(":")
            require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16, "hosts.address", self.address,
                    "HOST:PORT of the first process")
            require(self.count is not None, "hosts.count", self.count, "the number of processes, with hosts.address")
            require(self.index is not None and 0 <= self.index < self.count, "hosts.index", self.index,
                    f"the number of this process, 0 to {self.count - 1}, with hosts.address")


def detect_process_count() -> int:
    """Return the number of processes of the cluster that this one is part of; 1: there is none, or nobody else.

    No device is touched. Raises `ConfigError` if there is a cluster that does not say how large it is.
    """
    for name, present, count in clusters.CLUSTERS:
        if present():
            try:
                return count()
            except Exception as error:
                raise ConfigError(f"this looks like a cluster ({name}), but it cannot be asked: {error}; for one host "
                                  "alone: --hosts.alone") from None
    return 1


def count_hosts(config: HostsConfig, shared: Any = None, *, name: str = "workdir") -> int:
    """Return the number of processes of the run.

    `shared` is the folder (called `name`) that all of them write to. Raises `ConfigError` if the number is not that of
    `config`, or if several have no such folder.
    """
    count = 1 if config.alone else config.count if config.address else detect_process_count()
    if config.count is not None:
        require(count == config.count, "hosts.count", config.count,
                f"{count}, which JAX found here; or hosts.address and hosts.index, where there is no cluster that it "
                "recognises")
    require(count == 1 or shared is not None, name, shared, f"one folder for all {count} hosts")
    return count


def join(config: HostsConfig, count: int) -> None:
    """Join this process to the others. Raises `ConfigError` if they cannot be found.

    To be called before JAX is asked for anything.
    """
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.address, config.count if config.address else None, config.index,
            heartbeat_timeout_seconds=math.ceil(2 * config.heartbeat) + 10)  # JAX's own comes after ours
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the {count} hosts of this run do not come together: {error}") from None


_supervisor: Link | None = None
_numbers = itertools.count()


@contextlib.contextmanager
def distributed(config: HostsConfig, shared: Any = None, *, name: str = "workdir") -> Iterator[None]:
    """Join the other hosts, if there are any, for what is done inside; the hosts leave together.

    Does nothing inside another one, or if JAX has been distributed already: then JAX's own failure detection has to
    do. An error that leaves it ends the other hosts, which print it; one that another host caused ends this process.
    What follows has to end the process with `exit_status`.
    """
    global _supervisor
    if _supervisor is not None or jax.distributed.is_initialized() or (
            count := count_hosts(config, shared, name=name)) == 1:
        yield
        return
    _supervisor, port = fork_supervised(config.timeout, config.heartbeat)
    try:
        heartbeat("starting", blocking=True)
        join(config, count)
        _connect(config, port)
        heartbeat("starting")
        yield
        barrier("end")
    except BaseException as error:
        _fail(error)
        raise
    _supervisor.send(over=True)
    _supervisor = None
    jax.distributed.shutdown()


def _connect(config: HostsConfig, port: int) -> None:
    """Connect the supervisors of all hosts to that of the first one, which listens at `port`."""
    own = {"addresses": _addresses(), "port": port, "token": secrets.token_hex(16)}
    first = _broadcast(own)
    if config.address:
        first["addresses"].insert(0, config.address.rpartition(":")[0].strip("[]"))
    _supervisor.send(index=jax.process_index(), count=jax.process_count(), **first)
    require(_supervisor.wait_for("linked"), "hosts", first["addresses"],
            f"an address of the first host at which port {first['port']} is reached")


def _addresses() -> list[str]:
    """Return the names and addresses of this machine, at which other hosts may reach it."""
    name, addresses = socket.gethostname(), []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # nothing is sent; this says by which address one leaves
        addresses.append(outward.getsockname()[0])
    with contextlib.suppress(OSError):
        addresses += [address[4][0] for address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys([name, *addresses]))


def _broadcast(value: Any) -> Any:
    """Return the JSON value of the first host; uses the devices."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    return json.loads(multihost_utils.broadcast_one_to_all(np.resize(data, size)).tobytes())


def _fail(error: BaseException) -> None:
    """Report an error of this host. If another host caused it, the process ends here."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    _supervisor.send(failed=reason, elsewhere=caused_elsewhere(error))
    _supervisor.wait_for("yours")
    plain = sys.excepthook

    def hook(*args):  # an exception that nobody catches ends the process without waiting for hosts that are gone
        plain(*args)
        exit_status(1)

    sys.excepthook = hook


def exit_status(code: int) -> int:
    """Return `code`; if an error was reported to other hosts, end the process with it here and now."""
    if _supervisor is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def heartbeat(phase: str, step: int | None = None, *, blocking: bool = False) -> None:
    """Report that this host makes progress: its phase and step, and if it waits for devices or other hosts."""
    if _supervisor is not None:
        _supervisor.send(phase=phase, step=step, blocking=blocking)


@contextlib.contextmanager
def waiting(phase: str) -> Iterator[None]:
    """Report that this host waits, for devices or other hosts, while it does what is done inside."""
    heartbeat(phase, blocking=True)
    yield
    heartbeat(phase)


def _exchange(phase: str, value: Any = None) -> Any:
    """Wait for all hosts; return the JSON value of the first one. No device is used if hosts are supervised."""
    if _supervisor is None:
        return _broadcast(value) if jax.distributed.is_initialized() and jax.process_count() > 1 else value
    with waiting(phase):
        _supervisor.send(exchange=next(_numbers), value=value)
        return _supervisor.wait_for("value")


def barrier(what: str) -> None:
    """Wait for all hosts."""
    _exchange(what)


def of_first(what: str, value: Any) -> Any:
    """Wait for all hosts and return the JSON value of the first one."""
    return _exchange(what, value)


def wait_for_path(name: str, path: Path) -> None:
    """Return once this host sees `path`, which the first host wrote.

    Raises `ConfigError` if it does not: then the folder, a field called `name`, is not that of the first host.
    """
    deadline = time.monotonic() + FILE_TIMEOUT
    while not path.exists():  # a network's file system may take its time
        require(time.monotonic() < deadline, name, str(path.parent), "a folder that all hosts share: the first one "
                f"wrote {path.name}, which is not there on this one")
        time.sleep(0.1)


def assert_same_on_all_hosts(**facts: Any) -> None:
    """Raise `ConfigError` on a host for which one of `facts` (JSON values) differs from that of the first host."""
    facts = json.loads(json.dumps(facts))
    changes = differences(_exchange("compare", facts), facts)
    if changes:
        raise ConfigError("this host has another configuration than the first one:\n  " + "\n  ".join(changes))
