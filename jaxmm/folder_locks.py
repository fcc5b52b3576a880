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
from collections.abc import Iterator
from pathlib import Path

import filelock

from jaxmm.paths import is_bucket

LEASE = 30.0
"""Seconds without a change after which a lease has expired."""
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
    lock = filelock.FileLock(folder / ".lock")
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
        self.folder = folder / ".lock"

    def __enter__(self):
        last = max(self._numbers(), default=0)
        if last:
            self._wait(self.folder / str(last))
        self._path = self.folder / str(last + 1)
        try:
            self._path.create(self._note(0))
        except FileExistsError:
            raise FolderInUse(f"another process has locked {self.folder.parent}") from None
        for number in self._numbers():
            if number <= last:
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
        return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "count": count}).encode()

    def _wait(self, path: Path) -> None:
        """Return when the lease at `path` has expired. Raises `FolderInUse` if it is renewed."""
        first, since = None, time.monotonic()
        while True:
            try:
                now = path.read_bytes()
            except FileNotFoundError:
                return
            if first is None:
                first = now
                if _is_gone(json.loads(now)):
                    return
                print(f"{self.folder.parent} was locked by another run; waiting {LEASE:.0f} s to see if it is still "
                      "there", file=sys.stderr)
            if now != first:
                raise FolderInUse(f"another process has locked {self.folder.parent}")
            if time.monotonic() - since > LEASE:
                return
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


def _is_gone(note: dict) -> bool:
    """Return whether the owner was a process of this machine that has ended."""
    if note["host"] != socket.gethostname() or note["process"] == os.getpid():
        return False
    try:
        os.kill(note["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
