"""Hosts watch each other: one that dies, fails or is stuck ends the run everywhere, with a line that names it.

Each host tells the others of itself through the key-value store of JAX's coordination service. The first host, which
runs that service, judges by its own clock and writes a verdict; every host reads it, prints it and ends with `STATUS`.
JAX alone ends the others of a host that died with a stack trace, and never those of one that is stuck.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

STATUS = 75
"""Exit status of a process that another host ended, or that was stuck: EX_TEMPFAIL, worth another try."""
LONG = 6
"""So many times as long may take what is not a step."""
SHORT = ("training", "reading data")
"""What a step consists of."""
BEATS, VERDICT, HEARD = "jaxmm/beat/", "jaxmm/verdict/", "jaxmm/heard/"
ELSEWHERE = re.compile(r"gloo|nccl|unavailable|deadline_exceeded|cancelled|barrier|coordination|collective", re.I)
"""Messages of errors that may come from a host that is gone."""


@dataclass(frozen=True)
class Heartbeat:
    """What a host tells of itself."""

    name: str
    beats: int = 0
    """Signs of life."""
    moves: int = 0
    """Signs of progress."""
    step: int = 0
    doing: str = "starting"
    waits: bool = False
    """It waits for the devices or for other hosts."""
    failed: str | None = None
    """An error that another host may have caused."""


@dataclass(frozen=True)
class HostStatus:
    """What is known of a host, and when that was new, in seconds."""

    pulse: Heartbeat
    alive: float
    moved: float
    failed: float | None = None

    def told(self, pulse: Heartbeat, now: float) -> "HostStatus":
        """With what it tells `now`."""
        return HostStatus(pulse, now if pulse.beats != self.pulse.beats else self.alive,
                    now if pulse.moves != self.pulse.moves else self.moved,
                    None if pulse.failed is None else now if self.failed is None else self.failed)


@dataclass(frozen=True)
class Failure:
    """Why the run ends."""

    host: int
    name: str
    what: str
    """A line for people, behind the host's name."""
    stuck: bool = False
    again: bool = True
    """Another try may do."""


def detect_failure(
    hosts: Sequence[HostStatus], now: float, *, timeout: float, heartbeat: float, interval: float
) -> Failure | None:
    """Which host ends the run, if one does: a dead one, else one that failed, else one that the others wait for.

    Where collectives failed somebody is most likely gone: then five beats that are missed are enough.
    """
    suspicion = [each.failed for each in hosts if each.failed is not None]
    patience = min(heartbeat, 5 * interval) if suspicion else heartbeat
    silent = [i for i, each in enumerate(hosts) if now - each.alive > patience]
    if silent:
        host = min(silent, key=lambda i: hosts[i].alive)
        return _verdict(hosts, host, now, f"is dead or cut off: no sign of life for {now - hosts[host].alive:.0f} s")
    if suspicion and now - min(suspicion) > 2 * patience:
        host = min((i for i, each in enumerate(hosts) if each.failed is not None), key=lambda i: hosts[i].failed)
        return _verdict(hosts, host, now, f"failed: {hosts[host].pulse.failed}")

    def late(each: HostStatus) -> bool:
        return now - each.moved > timeout * (1 if each.pulse.doing in SHORT else LONG)

    stuck = [i for i, each in enumerate(hosts) if late(each) and not each.pulse.waits]
    if not stuck and not all(late(each) and each.pulse.waits for each in hosts):
        return None
    host = min(stuck or range(len(hosts)), key=lambda i: (hosts[i].pulse.step, hosts[i].moved))
    whole = "" if stuck else ", like all others, which wait for each other or for devices"
    return replace(_verdict(hosts, host, now, f"is stuck{whole}"), stuck=True)


def _verdict(hosts: Sequence[HostStatus], host: int, now: float, what: str) -> Failure:
    seen = hosts[host]
    return Failure(host, seen.pulse.name, f"{what}; last seen {seen.pulse.doing} at step {seen.pulse.step}, "
                   f"{now - seen.moved:.0f} s ago")


def caused_elsewhere(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, may come from a host that is gone."""
    while error is not None:
        if (isinstance(error, (jax.errors.JaxRuntimeError, ValueError, RuntimeError, TimeoutError))
                and ELSEWHERE.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


class Watchdog:
    """Tells the others of this host, and ends the process on a verdict. `client` is the coordination service's."""

    def __init__(self, client: Any, index: int, count: int, coordinator: str, *, timeout: float, heartbeat: float):
        self.client, self.index, self.count, self.coordinator = client, index, count, coordinator
        self.timeout, self.heartbeat, self.interval = timeout, heartbeat, min(2.0, heartbeat / 10)
        self._pulse, self._lock = Heartbeat(socket.gethostname()), threading.RLock()
        self._over, self._settled, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._own, self._reached = False, time.monotonic()
        self._hosts = [HostStatus(Heartbeat("?"), self._reached, self._reached) for _ in range(count)]
        self._threads = [threading.Thread(target=each, name="hosts", daemon=True) for each in (self._talk, self._look)]
        self._abort = _Abort(self)

    def start(self) -> None:
        """Begins."""
        self._abort.install()
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Ends, where all hosts are done."""
        self._over.set()
        for each in self._threads:
            each.join()
        self._abort.remove()

    def heartbeat(self, doing: str, step: int | None, waits: bool) -> None:
        """Notes progress."""
        with self._lock:
            self._pulse = replace(self._pulse, moves=self._pulse.moves + 1, doing=doing, waits=waits,
                                  step=self._pulse.step if step is None else step)

    def fail(self, error: BaseException) -> None:
        """Tells the others of an error of this host. Where it turns out that another host caused it, the process ends
        here."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        with self._lock:
            pulse = self._pulse
            self._own = not caused_elsewhere(error)
            self._pulse = replace(pulse, moves=pulse.moves + 1, failed=None if self._own else reason)
        if self._own or not self._settled.wait(self.heartbeat + 20 * self.interval):
            self._write(Failure(self.index, pulse.name, f"failed {pulse.doing} at step {pulse.step}: {reason}",
                                again=False))
        self._settled.wait(10 * self.interval)
        self._hear()
        self._wait_until_heard()

    def end(self, verdict: Failure, *, heard: bool = True) -> None:
        """Prints `verdict` and ends the process; tells the first host that it was `heard`."""
        self._ending.acquire()  # for good: whoever comes second waits for the end
        self._say(f"error: host {verdict.host} ({verdict.name}) {verdict.what}. "
                  + ("This is that host" if verdict.host == self.index else f"Host {self.index} ends with it")
                  + ("; the same command on all hosts goes on from the last checkpoint" if verdict.again else ""))
        if verdict.stuck and verdict.host == self.index:
            with contextlib.suppress(Exception):  # stderr may be something without a file
                faulthandler.dump_traceback(all_threads=True)
        if heard:
            self._hear()
        self._wait_until_heard()
        os._exit(STATUS)

    def end_if_ending(self) -> None:
        """Does not return where another thread is about to end the process."""
        if self._ending.locked():
            self._ending.acquire()

    def _say(self, line: str) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _write(self, verdict: Failure) -> None:
        with contextlib.suppress(Exception):  # the first one counts; without a store, `_look` ends the process
            self.client.key_value_set(f"{VERDICT}0", json.dumps(asdict(verdict)))

    def _hear(self) -> None:
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{HEARD}{self.index}", "1", allow_overwrite=True)

    def _wait_until_heard(self) -> None:
        """The first host, without which nobody hears anything, goes last."""
        deadline = time.monotonic() + 6 * self.interval
        while self.index == 0 and time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                heard = {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get(HEARD)} | {0}
                now = time.monotonic()
                if all(i in heard or now - each.alive > 3 * self.interval for i, each in enumerate(self._hosts)):
                    return
            time.sleep(self.interval / 10)

    def _talk(self) -> None:
        """Publishes the pulse and reads the verdict; on the first host judges."""
        while not self._over.is_set():
            try:
                with self._lock:
                    self._pulse = replace(self._pulse, beats=self._pulse.beats + 1)
                self.client.key_value_set(f"{BEATS}{self.index}/now", json.dumps(asdict(self._pulse)),
                                          allow_overwrite=True)
                self._reached = time.monotonic()
                self._read()
            except Exception:  # `_look` decides when that has lasted too long
                pass
            self._over.wait(self.interval)

    def _read(self) -> None:
        now = time.monotonic()
        for key, text in self.client.key_value_dir_get(BEATS if self.index == 0 else f"{BEATS}0/"):
            host = int(key.split("/")[2])
            self._hosts[host] = self._hosts[host].told(Heartbeat(**json.loads(text)), now)
        told = self._told()
        if told is None and self.index == 0:
            verdict = detect_failure(
                self._hosts, now, timeout=self.timeout, heartbeat=self.heartbeat, interval=self.interval)
            if verdict is not None:
                self._write(verdict)
                told = self._told()
        if told is not None:
            self._settle(told)

    def _told(self) -> Failure | None:
        detect_process_count = self.client.key_value_dir_get(VERDICT)
        return Failure(**json.loads(detect_process_count[0][1])) if detect_process_count else None

    def _settle(self, verdict: Failure) -> None:
        if self._own or (verdict.host == self.index and not verdict.stuck):
            self._settled.set()  # the main thread says what it was
        else:
            self.end(verdict)

    def _look(self) -> None:
        """Ends the process when the store has not answered for too long."""
        while not self._over.wait(self.interval):
            silence = time.monotonic() - self._reached
            if silence > self.heartbeat:
                self.end(self.gone(f"no answer for {silence:.0f} s"), heard=False)

    def gone(self, how: str) -> Failure:
        """The verdict on the first host, which cannot write one itself."""
        return _verdict(self._hosts, 0, time.monotonic(), f"is dead or cut off: {how}")

    def unreachable(self) -> bool:
        """Whether nobody listens where the first host should."""
        host, _, port = self.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except OSError:
            return True
        return False


class _Abort:
    """Says in a line that the first host died. JAX then aborts the others at once, from a thread of its own, and
    takes no callback in Python; so the signal is caught that `abort` raises."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog, self._before = watchdog, None
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._caught)

    def install(self) -> None:
        """Catches it from now on."""
        self._before = self._set(ctypes.cast(self._handler, ctypes.c_void_p))

    def remove(self) -> None:
        """Leaves it to whoever had it before."""
        self._set(self._before)

    def _set(self, handler: Any) -> Any:
        function = ctypes.CDLL(None).signal
        function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        return function(signal.SIGABRT, handler)

    def _caught(self, _: int) -> None:
        if self.watchdog.index and self.watchdog.unreachable():
            self.watchdog.end(self.watchdog.gone("it closed its connection"), heard=False)
        self.watchdog.end_if_ending()  # else `abort` goes on
