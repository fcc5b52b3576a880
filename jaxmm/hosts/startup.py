"""The processes of a run, one or several on each machine: how they find each other, wait, and end together.

TPU pods, SLURM, Open MPI and Kubernetes are recognised by JAX; elsewhere `HostsConfig` says who is who. What a host
tells of itself with `heartbeat` is watched by `jaxmm.hosts.heartbeat`.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax._src import clusters
from jax._src.distributed import global_state  # the key-value store has no public name

from jaxmm.config import ConfigError, differences, require
from jaxmm.hosts.heartbeat import Watchdog
from jaxmm.validation import check_types

log = logging.getLogger(__name__)

WEEK = 7 * 24 * 60 * 60 * 1000
"""Milliseconds that a host waits for the others: it is the watchdog that ends a run."""
SEEN = 70.0
"""Seconds until what one host wrote is seen on another; NFS keeps what it knows of a folder for up to 60."""


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Which processes train together. On a TPU pod, under SLURM, Open MPI and in an indexed Job of Kubernetes nothing
    need be said."""

    address: str | None = None
    """HOST:PORT of the first process, where there is no cluster that is recognised; then `count` and `index` too."""
    count: int | None = None
    """Processes of the run. Without `address`: so many have to be found, or nothing starts."""
    index: int | None = None
    """Number of this process, from 0."""
    alone: bool = False
    """Do not look for others, whatever cluster this is."""
    timeout: float = 300.0
    """Seconds without progress after which a host counts as stuck, and all end; six times as long while it compiles,
    evaluates, or reads or writes a checkpoint."""
    heartbeat: float = 60.0
    """Seconds without a sign of life after which a host counts as dead, and all end."""

    def __post_init__(self):
        """Checks that all is said or nothing."""
        check_types(self, "hosts")
        for name in ("timeout", "heartbeat"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"hosts.{name}", value, "a positive number of seconds")
        require(self.count is None or self.count > 0, "hosts.count", self.count, "a positive number")
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
    """Processes of the cluster that this one is part of, as JAX recognises it; 1: none, or nobody else.

    No device is touched. Raises `ConfigError` where there is a cluster that does not say how large it is.
    """
    for each in clusters.ClusterEnv._cluster_types:
        try:
            present = not each.opt_in_only_method and each.is_env_present()
        except Exception as error:  # of whatever a cluster is asked with
            log.warning("%s cannot be asked: %s", each.__name__, error)
            continue
        if not present:
            continue
        if _single(each.__name__):
            return 1
        try:
            return int(each.get_process_count())
        except Exception as error:
            raise ConfigError(f"this looks like a cluster ({each.__name__}), but it cannot be asked: {error}; for one "
                              "host alone: --hosts.alone") from None
    return 1


def _single(cluster: str) -> bool:
    """Whether this is a pod that is not of an indexed Job, or the only worker of a TPU slice, as in Colab, where there
    may be nobody to be asked."""
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return ((cluster == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ)
            or (cluster == "GkeTpuCluster" and "," not in workers and "MEGASCALE_NUM_SLICES" not in os.environ))


def join(config: HostsConfig, shared: Any = None, *, name: str = "workdir") -> Watchdog | None:
    """Joins this process to the others, if there are any, and begins to watch them; None: it is alone.

    `shared` is the folder (called `name`) that all of them write to. To be called before JAX is asked for anything.
    Raises `ConfigError` where the others cannot be found.
    """
    count = 1 if config.alone else config.count if config.address else detect_process_count()
    if config.count is not None:
        require(count == config.count, "hosts.count", config.count,
                f"{count}, which JAX found here; or hosts.address and hosts.index, where there is no cluster that it "
                "recognises")
    if count == 1:
        return None
    require(shared is not None, name, shared, f"one folder for all {count} hosts")
    if not jax.distributed.is_initialized():
        if jax.config.jax_cpu_collectives_implementation in (None, "none"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                config.address, config.count if config.address else None, config.index,
                heartbeat_timeout_seconds=math.ceil(2 * config.heartbeat) + 10)  # JAX's own comes after ours
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"the {count} hosts of this run do not come together: {error}") from None
    return Watchdog(global_state.client, global_state.process_id, global_state.num_processes,
                    global_state.coordinator_address, timeout=config.timeout, heartbeat=config.heartbeat)


_watching: Watchdog | None = None
_names = itertools.count()


@contextlib.contextmanager
def distributed(config: HostsConfig, shared: Any = None, *, name: str = "workdir") -> Iterator[None]:
    """As `join`, for what is done inside; the hosts leave together. Inside another one it does nothing.

    An error that leaves it ends the other hosts, who say what it was; one that another host caused ends this process.
    What follows has to end the process with `exit_status`.
    """
    global _watching
    if _watching is not None:
        yield
        return
    _watching = watchdog = join(config, shared, name=name)
    if watchdog is None:
        yield
        return
    watchdog.start()
    try:
        yield
        barrier("end")
    except BaseException as error:
        watchdog.fail(error)
        _end_at_once()
        raise
    watchdog.stop()
    _watching = None
    jax.distributed.shutdown()


def _end_at_once() -> None:
    """An exception that nobody catches ends the process without waiting for hosts that are gone."""
    plain = sys.excepthook

    def hook(*args):
        plain(*args)
        exit_status(1)

    sys.excepthook = hook


def exit_status(code: int) -> int:
    """The exit status `code`; where other hosts were told of an error, the process ends here and now."""
    if _watching is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def heartbeat(doing: str, step: int | None = None, *, waits: bool = False) -> None:
    """Notes that this host gets on: what it does now, in which step, and whether it `waits` for devices or other hosts.
    """
    if _watching is not None:
        _watching.heartbeat(doing, step, waits)


def barrier(what: str) -> None:
    """Waits for all hosts; no device is used."""
    if jax.distributed.is_initialized() and global_state.num_processes > 1:
        heartbeat(what, waits=True)
        global_state.client.wait_at_barrier(f"jaxmm/meet/{next(_names)} {what}", WEEK)
        heartbeat(what)


def wait_for_path(name: str, path: Path) -> None:
    """Returns once this host sees `path`, which the first host wrote. Raises `ConfigError` where it does not: then the
    folder, a field called `name`, is not the one that the first host writes to."""
    deadline = time.monotonic() + SEEN
    while not path.exists():  # a network's file system may take its time
        require(time.monotonic() < deadline, name, str(path.parent), "a folder that all hosts share: the first one "
                f"wrote {path.name}, which is not there on this one")
        time.sleep(0.1)


def assert_same_on_all_hosts(**facts: Any) -> None:
    """Raises `ConfigError` on a host for which one of `facts` (JSON values) is another than on the first host."""
    if not jax.distributed.is_initialized() or global_state.num_processes == 1:
        return
    key, client = f"jaxmm/same/{next(_names)}", global_state.client
    if global_state.process_id == 0:
        client.key_value_set(key, json.dumps(facts))
        return
    heartbeat("compare", waits=True)
    first = json.loads(client.blocking_key_value_get(key, WEEK))
    changes = differences(first, json.loads(json.dumps(facts)))
    if changes:
        raise ConfigError("this host was told something else than the first one:\n  " + "\n  ".join(changes))
