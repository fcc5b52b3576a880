"""Lock a folder for one process: by a file, or in a bucket by a lease.

A lease is an object `.lock/N`, which its owner writes again every few seconds. Another process takes the folder over by
creating `.lock/N+1`, which only one can do, if the object did not change for `LEASE` seconds (no clocks are compared),
or if its owner ran on the same machine and is gone. An owner that finds it was replaced ends its process.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock

from jaxmm.paths import is_bucket

LOCK = ".lock"
"""Name of the file, or of the folder of leases."""
LEASE = 90.0
"""Seconds without a change after which a lease has expired: more than a renewal may wait for an answer."""
RENEWAL = 5.0
"""Seconds between the renewals of a lease."""
REPLACED = 75
"""Exit status of a process whose folder another one has taken over."""


class FolderInUse(OSError):
    """Another process has locked the folder."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock `folder`, which is made. Raises `FolderInUse`, or `OSError` if it cannot be written."""
    if is_bucket(folder):
        with _Lease(folder):
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise FolderInUse(f"another process has locked {folder}") from None
    try:
        yield
    finally:
        lock.release()


class _Lease:
    """A lease of a folder in a bucket, renewed by a thread."""

    def __init__(self, folder: Path):
        self.folder, self._id = folder / LOCK, uuid.uuid4().hex

    def __enter__(self):
        before = self._numbers()
        while before and not self._is_expired(self.folder / str(max(before))):
            before = self._numbers()
        last = max(before, default=0)
        self._path = self.folder / str(last + 1)
        try:
            self._path.create(self._note(0))
        except FileExistsError:
            raise FolderInUse(f"another process has locked {self.folder.parent}") from None
        if set(self._numbers()) - {*before, last + 1}:  # its owner saw other numbers
            self._path.unlink(missing_ok=True)
            raise FolderInUse(f"another process has locked {self.folder.parent}")
        for number in before:
            (self.folder / str(number)).unlink(missing_ok=True)
        self._next = self.folder / str(last + 2)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it expires
            self._path.unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        try:
            return [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
        except FileNotFoundError:
            return []

    def _note(self, count: int) -> bytes:
        return json.dumps({"machine": machine(), "process": os.getpid(), "id": self._id, "count": count}).encode()

    def _is_expired(self, path: Path) -> bool:
        """Return True when the lease at `path` has expired, False if it was given back.

        Raises `FolderInUse` if it is renewed.
        """
        first, since = None, time.monotonic()
        while True:
            try:
                now = path.read_bytes()
            except FileNotFoundError:
                return False
            if first is None:
                first = now
                if _is_gone(json.loads(now)):
                    return True
                print(f"{self.folder.parent} was locked by another run; waiting {LEASE:.0f} s to see if it is still "
                      "there", file=sys.stderr)
            if now != first:
                raise FolderInUse(f"another process has locked {self.folder.parent}")
            if time.monotonic() - since > LEASE:
                return True
            time.sleep(min(1.0, RENEWAL))

    def _renew(self) -> None:
        count = 0
        while not self._over.wait(RENEWAL):
            count += 1
            try:
                if not self._path.exists() or self._next.exists():
                    print(f"error: another process has taken {self.folder.parent} over; this one ends",
                          file=sys.stderr, flush=True)
                    os._exit(REPLACED)
                if not self._over.is_set():
                    self._path.write_bytes(self._note(count))
            except OSError as error:  # until it works again, or somebody takes over
                print(f"the lock of {self.folder.parent} cannot be renewed: {error}", file=sys.stderr)


def machine() -> str:
    """Return what tells machines apart that have the same name, and containers that number their processes alike."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux says it
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(names)


def _is_gone(note: dict) -> bool:
    """Return whether the owner was a process of this machine that has ended."""
    if note.get("machine") != machine() or note["process"] == os.getpid():
        return False
    try:
        os.kill(note["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
