"""Supervise a host of a run from a process of its own.

A run on several hosts forks on each of them before JAX starts. The child trains; its parent, the supervisor, knows
nothing of JAX. The child reports to it through a socket pair; supervisors report to that of the first host over TCP,
which judges by its own clock and sends its verdict to all. A supervisor outlives whatever happens to its child: a hang
that holds the interpreter, a signal, or JAX, which aborts the process when it loses the first host.
"""

import contextlib
import faulthandler
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

from jaxmm.hosts.heartbeat import STATUS, Failure, Heartbeat, HostStatus, dead, detect_failure, failure

DUMP = signal.SIGUSR2
"""Signal on which the child prints the stacks of its threads."""


class Link:
    """Messages over a socket, one JSON object per line."""

    def __init__(self, sock: socket.socket):
        self.sock, self._buffer, self._lock = sock, b"", threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message; a broken connection is left to whoever reads from it."""
        with self._lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived, after waiting for some; None if the other end is gone."""
        try:
            data = self.sock.recv(2**16)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            return [json.loads(line) for line in lines] if data else None
        except (OSError, ValueError):
            return None

    def wait_for(self, name: str) -> Any:
        """Return the field `name` of the first message that has it. For the child, to which nothing else is sent."""
        while (messages := self.receive()) is not None:
            for message in messages:
                if name in message:
                    return message[name]
        os._exit(1)  # the supervisor is gone


def fork_supervised(timeout: float, heartbeat: float) -> tuple[Link, int]:
    """Fork; return, in the child only, the link to its supervisor and the TCP port on which that may listen.

    The process that called this supervises from here on and exits as `Supervisor.run` says.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ours, theirs = socket.socketpair()
    alive, held_open = os.pipe()
    listener = _listen()
    child = os.fork()
    if child:
        theirs.close()
        os.close(alive)
        os._exit(Supervisor(child, Link(ours), listener, timeout, heartbeat).run())
    os.setpgrp()  # Ctrl-C reaches the supervisor alone, which passes it on
    ours.close()
    os.close(held_open)
    port = listener.getsockname()[1]
    listener.close()

    def follow():
        os.read(alive, 1)  # returns when the supervisor is gone
        os._exit(1)

    threading.Thread(target=follow, name="supervisor", daemon=True).start()
    with contextlib.suppress(Exception):  # stderr may be something without a file
        faulthandler.register(DUMP, all_threads=True)
    return Link(theirs), port


def _listen() -> socket.socket:
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    except (OSError, ValueError):
        return socket.create_server(("", 0), backlog=1024)


class Supervisor:
    """The parent of the process that trains, on one host."""

    def __init__(self, child: int, pipe: Link, listener: socket.socket, timeout: float, heartbeat: float):
        self.child, self.pipe, self.listener = child, pipe, listener
        self.timeout, self.heartbeat, self.interval = timeout, heartbeat, min(2.0, heartbeat / 10)
        self.index, now = 0, time.monotonic()
        self.hosts = [HostStatus(Heartbeat(socket.gethostname()), now, now)]
        self.links: dict[int, Link] = {}
        """To all other hosts on the first one; elsewhere to the first one."""
        self.failure: Failure | None = None
        self.own = False  # the child itself failed and says why
        self.over = False  # all hosts are done
        self.status: int | None = None
        self._token, self._asked, self._beaten = "", 0.0, now
        self._arrived: dict[int, set[int]] = defaultdict(set)
        self._values: dict[int, Any] = {}
        self._selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Supervise until the child or the run ends; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        self._selector.register(self.pipe.sock, selectors.EVENT_READ, self._read_child)
        while self.failure is None:
            for key, _ in self._selector.select(min(self.interval, 0.1)):
                key.data()
            if self.failure is None and self._child_ended():
                if self.over:
                    return self.status
                self._judge_child()
            if self.failure is None and not self.over and time.monotonic() - self._beaten > self.interval:
                self._beat()
        return self._end(self.failure)

    def _pass_on(self, number: int, frame: Any) -> None:
        """Pass a signal on to the child; a second one, a second later or more, ends both at once."""
        now = time.monotonic()
        if self._asked and now - self._asked > 1:
            self._kill(signal.SIGKILL)
            os._exit(128 + number)
        self._asked = self._asked or now
        self._kill(number)

    def _kill(self, number: int) -> None:
        if self.status is None:
            os.kill(self.child, number)

    def _child_ended(self) -> bool:
        if self.status is None and (ended := os.waitpid(self.child, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            self.status = code if code >= 0 else 128 - code
            while select_now(self.pipe.sock) and self._read_child():  # its last words
                pass
            return self.failure is None
        return False

    def _judge_child(self) -> None:
        """Say how the child ended without a word. JAX aborts it if another host is gone: then the first host judges."""
        now, signals = time.monotonic(), {128 + number: number.name for number in signal.Signals}
        how = f"exited with status {self.status}" if self.status not in signals else f"got {signals[self.status]}"
        if self.status == 128 + signal.SIGABRT:
            self._update_own(failed="the process was aborted")
        else:
            self._fail(failure(self.hosts, self.index, now, f"died: its process {how}"))

    def _update_own(self, **fields: Any) -> None:
        status = self.hosts[self.index]
        self.hosts[self.index] = status.updated(replace(status.heartbeat, **fields), time.monotonic())

    def _beat(self) -> None:
        now = self._beaten = time.monotonic()
        self._update_own(beats=self.hosts[self.index].heartbeat.beats + 1)
        for link in self.links.values():
            link.send(heartbeat=asdict(self.hosts[self.index].heartbeat))
        if self.index == 0:
            self.failure = detect_failure(self.hosts, now, timeout=self.timeout, heartbeat=self.heartbeat,
                                          interval=self.interval)
        elif (silence := now - self.hosts[0].alive) > self.heartbeat:
            self.failure = dead(self.hosts, 0, now, f"no sign of life for {silence:.0f} s")

    def _read_child(self) -> bool:
        messages = self.pipe.receive()
        if messages is None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self.pipe.sock)
            return False
        for message in messages:
            match message:
                case {"phase": phase, "step": step, "blocking": blocking}:
                    heartbeat = self.hosts[self.index].heartbeat
                    self._update_own(progress=heartbeat.progress + 1, phase=phase, blocking=blocking,
                                     step=heartbeat.step if step is None else step)
                case {"exchange": number, "value": value}:
                    if self.index == 0:
                        self._values[number] = value
                    self._arrive(self.index, number)
                case {"failed": reason, "elsewhere": True}:
                    self._update_own(progress=self.hosts[self.index].heartbeat.progress + 1, failed=reason)
                case {"failed": reason}:
                    heartbeat = self.hosts[self.index].heartbeat
                    self._fail(Failure(self.index, heartbeat.name, f"failed {heartbeat.phase} at step "
                                       f"{heartbeat.step}: {reason}", again=False))
                case {"over": True}:
                    self._finish()
                case {"index": index, "count": count, **first}:
                    self._connect(index, count, **first)
        return True

    def _fail(self, reason: Failure) -> None:
        """End the run because of this host."""
        self.own, self.failure = True, reason
        if self.index and self.links:
            self.links[0].send(failure=asdict(reason))

    def _finish(self) -> None:
        """Stop judging: all hosts have passed the last barrier."""
        self.over = True
        for link in self.links.values():
            link.send(over=True)

    def _connect(self, index: int, count: int, *, addresses: list[str], port: int, token: str) -> None:
        """Connect to the supervisor of the first host, or let the others connect."""
        now, own = time.monotonic(), self.hosts[0].heartbeat
        self.index, self._token = index, token
        self.hosts = [HostStatus(own if i == index else Heartbeat("?"), now, now) for i in range(count)]
        if index == 0:
            self._selector.register(self.listener, selectors.EVENT_READ, self._accept)
        else:
            self.listener.close()
            for address in addresses:
                with contextlib.suppress(OSError):
                    link = Link(socket.create_connection((address, port), timeout=5.0))
                    link.send(token=token, index=index)
                    self._add(0, link)
                    break
            else:
                self.pipe.send(linked=False)
                return
        self.pipe.send(linked=True)

    def _accept(self) -> None:
        link = Link(self.listener.accept()[0])
        link.sock.settimeout(5.0)

        def greet():
            if (messages := link.receive()) == []:
                return  # half a line
            self._selector.unregister(link.sock)
            match messages and messages[0]:
                case {"token": self._token, "index": int(index)}:
                    self._add(index, link)
                    self._read_host(index, messages[1:])
                case _:  # something else that found the port
                    link.sock.close()

        self._selector.register(link.sock, selectors.EVENT_READ, greet)

    def _add(self, index: int, link: Link) -> None:
        link.sock.settimeout(self.heartbeat)
        self.links[index] = link
        self._selector.register(link.sock, selectors.EVENT_READ, lambda: self._read_host(index, link.receive()))
        link.send(heartbeat=asdict(self.hosts[self.index].heartbeat))

    def _read_host(self, index: int, messages: list[dict[str, Any]] | None) -> None:
        if messages is None:
            self._selector.unregister(self.links.pop(index).sock)
            if not self.over and self.failure is None:
                self.failure = dead(self.hosts, index, time.monotonic(), "it closed its connection")
            return
        for message in messages:
            match message:
                case {"heartbeat": fields}:
                    self.hosts[index] = self.hosts[index].updated(Heartbeat(**fields), time.monotonic())
                case {"exchange": number}:
                    self._arrive(index, number)
                case {"go": number, "value": value}:
                    self.pipe.send(go=number, value=value)
                case {"failure": fields}:
                    self.failure = self.failure or Failure(**fields)
                case {"over": True} if not self.over:
                    self._finish()

    def _arrive(self, index: int, number: int) -> None:
        """Note that host `index` waits in exchange `number`; let all go on when all do."""
        if self.index:
            self.links[0].send(exchange=number)
            return
        self._arrived[number].add(index)
        if len(self._arrived[number]) == len(self.hosts):
            del self._arrived[number]
            value = self._values.pop(number)
            for link in (self.pipe, *self.links.values()):
                link.send(go=number, value=value)

    def _end(self, verdict: Failure) -> int:
        """End the child, after it has said why if it is the one that failed; return the exit status."""
        if self.index == 0:
            for link in self.links.values():
                link.send(failure=asdict(verdict))
        mine = verdict.host == self.index
        if self.own or (mine and not verdict.stuck):
            self.pipe.send(yours=True)
            deadline = time.monotonic() + self.timeout
            while not self._ended_quietly() and time.monotonic() < deadline:
                time.sleep(0.02)
        else:
            sys.stderr.write(
                f"error: host {verdict.host} ({verdict.name}) {verdict.what}. "
                + ("This is that host" if mine else f"Host {self.index} ends with it")
                + ("; the same command on all hosts goes on from the last checkpoint" if verdict.again else "") + "\n")
            sys.stderr.flush()
            if mine:  # it is stuck
                self._kill(DUMP)
                time.sleep(1)
            self._kill(signal.SIGKILL)
            self.status = STATUS
        if self.status is None:
            self._kill(signal.SIGKILL)
            self.status = STATUS
        deadline = time.monotonic() + 6 * self.interval
        for link in self.links.values() if self.index == 0 else ():  # the first host, whom all listen to, goes last
            link.sock.settimeout(max(deadline - time.monotonic(), 0.01))
            while link.receive() is not None and time.monotonic() < deadline:
                pass
        return self.status

    def _ended_quietly(self) -> bool:
        self._child_ended()
        return self.status is not None


def select_now(sock: socket.socket) -> bool:
    """Return whether there is something to read."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))
