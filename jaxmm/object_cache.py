"""Keep the parts of a bucket's objects that were read on the local disk, within a limit, for all processes.

An object has a sparse file, which begins with one byte per block that says whether the block is there. A read fetches
the missing blocks that it needs with one request, and more and more of what follows if the file is read in order. What
was not used for the longest time is removed first, except copies that a running process uses.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import mmap
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

from jaxmm.user_cache import cache_folder

BLOCK = 2**16
"""Bytes that are fetched together at least."""
AHEAD = 2**24
"""Largest number of bytes that are fetched ahead."""
OPEN = 256
"""Number of objects that stay open in a process."""
CHECK = 2**26
"""Bytes that a process adds to the total of the cache before it fetches them."""
ROOM = 0.9
"""Share of the limit that stays when the cache has reached it."""
STREAMS = 16
"""Number of files that are copied at the same time."""


def limit() -> int:
    """Return the largest size of the cache in bytes: JAXMM_BUCKET_CACHE in GiB, at most half of the free disk."""
    return _limit(_grow(0))


def _limit(size: int) -> int:
    """Return the limit of a cache that has `size` bytes."""
    asked = float(os.environ.get("JAXMM_BUCKET_CACHE", "32")) * 2**30
    free = shutil.disk_usage(_folder()).free
    return int(min(asked, size + free) if "JAXMM_BUCKET_CACHE" in os.environ else min(asked, size + free / 2))


def used() -> int:
    """Count the bytes on the disk; return their number."""
    return sum(_size(entry) for entry in _entries())


def open_object(path: Path, version: str) -> io.BufferedReader:
    """Open this version of an object to read, through the cache."""
    return io.BufferedReader(_Reader(_cached(path, version)), BLOCK)


@functools.lru_cache(maxsize=2**16)
def known_version(path: Path, process: int) -> str:
    """Return the version of an object, which is asked for once."""
    return path.version()


def copy_files(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Return a copy of an object, or of those files of a folder whose relative paths are `wanted`, on the local disk.

    Only what has changed is downloaded. Files that were copied before stay as long as the bucket has them.
    """
    single = path.is_file()
    target = _folder() / f"copy-{_digest(str(path))}"
    _keep(target)
    with filelock.FileLock(target / ".lock"):
        notes = target / ".versions"
        have = json.loads(notes.read_text()) if notes.exists() else {}
        files = {path.name: path} if single else {p.relative_to(path).as_posix(): p for p in path.files()}

        def fetch(item: tuple[str, Path]) -> tuple[str, str]:
            name, remote = item
            local, now = target / name if single else target / path.name / name, remote.version()
            if have.get(name) != now or not local.exists():
                local.parent.mkdir(parents=True, exist_ok=True)
                part = local.with_name(local.name + ".part")
                remote.download(part)
                part.replace(local)
            return name, now

        with ThreadPoolExecutor(STREAMS) as pool:
            now = dict(pool.map(fetch, (item for item in files.items() if wanted(item[0]))))
        for name in set(have) - set(files):
            (target / path.name / name).unlink(missing_ok=True)
        notes.write_text(json.dumps({name: version for name, version in (have | now).items() if name in files}))
    _grow(sum(int(version.partition(" ")[0]) for name, version in now.items() if have.get(name) != version))
    return target / path.name


class _Object:
    """One version of an object: what of it is on the disk, and how the rest is fetched."""

    def __init__(self, path: Path, version: str):
        self.path, self.version, self.size = path, version, int(version.partition(" ")[0])
        self._changed, self._pending = threading.Condition(), set()
        name = f"file-{_digest(f'{self.path} {self.version} {_boot()}')}"
        self._file = os.open(_folder() / name, os.O_RDWR | os.O_CREAT, 0o600)
        count = max(1, -(-self.size // BLOCK))
        self._start = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        if os.fstat(self._file).st_size < self._start + self.size:
            os.ftruncate(self._file, self._start + self.size)
        self._present = mmap.mmap(self._file, count, access=mmap.ACCESS_READ)
        os.utime(self._file)

    def __del__(self):
        with contextlib.suppress(AttributeError):  # if it could not be opened
            os.close(self._file)

    @property
    def removed(self) -> bool:
        """True if the file was removed to make room: the space is free when nobody reads it any more."""
        return os.fstat(self._file).st_nlink == 0

    def read(self, start: int, stop: int, ahead: int) -> bytes:
        """Return bytes `start` to `stop`. With missing blocks, `ahead` bytes behind them are fetched too."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        while (part := self._claim(first, last, -(-min(stop + ahead, self.size) // BLOCK))) is not None:
            begin, end = part
            try:
                data = self.path.read_range(begin * BLOCK, min(end * BLOCK, self.size))
                _write(self._file, data, self._start + begin * BLOCK)
                _write(self._file, b"\1" * (end - begin), begin)
            finally:
                with self._changed:
                    self._pending.difference_update(range(begin, end))
                    self._changed.notify_all()
            _count(len(data))
        return os.pread(self._file, stop - start, self._start + start)

    def _claim(self, first: int, last: int, furthest: int) -> tuple[int, int] | None:
        """Return the next run of blocks that this thread has to fetch; None when blocks `first` to `last` are there."""
        with self._changed:
            while True:
                missing = [n for n in range(first, last) if not self._present[n]]
                mine = next((n for n in missing if n not in self._pending), None)
                if mine is not None:
                    end = mine + 1
                    while end < max(last, furthest) and not self._present[end] and end not in self._pending:
                        end += 1
                    self._pending.update(range(mine, end))
                    return mine, end
                if not missing:
                    return None
                self._changed.wait()


def _write(file: int, data: bytes, position: int) -> None:
    """Write all of `data`, or raise `OSError`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count


class _Reader(io.RawIOBase):
    """A position in an object. It reads ahead while the position moves forward in small steps."""

    def __init__(self, cached: _Object):
        self.object, self._at, self._last, self._ahead = cached, 0, 0, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position."""
        self._at = offset + (0, self._at, self.object.size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer) -> int:
        """Read into `buffer`, less at the end of the object."""
        stop = min(self._at + len(buffer), self.object.size)
        if stop <= self._at:
            return 0
        if self.object.removed:
            self.object = _cached(self.object.path, self.object.version)
        forward = 0 < self._last <= self._at <= self._last + max(self._ahead, 4 * BLOCK)
        self._ahead = min(max(2 * self._ahead, 4 * BLOCK), AHEAD) if forward else 0
        data = self.object.read(self._at, stop, self._ahead)
        buffer[:len(data)] = data
        self._at = self._last = self._at + len(data)
        return len(data)


_opened: dict[tuple[Path, str, int], _Object] = {}
_opening = threading.Lock()


def _cached(path: Path, version: str) -> _Object:
    """Return the object, which processes open each by itself."""
    name = path, version, os.getpid()
    with _opening:
        known = _opened.pop(name, None)
        _opened[name] = _Object(path, version) if known is None or known.removed else known
        if len(_opened) > OPEN:
            del _opened[next(iter(_opened))]
        return _opened[name]


@functools.cache
def _boot() -> str:
    """Return the number of this start of the machine: what a crash left on the disk is not read."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text() if path.exists() else ""


def _folder() -> Path:
    folder = cache_folder() / "buckets"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _entries() -> list[Path]:
    return list(_folder().iterdir())


def _size(entry: Path) -> int:
    total = 0
    for path in (entry, *entry.rglob("*")):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


_fetched = 0
_counting = threading.Lock()


def _count(size: int) -> None:
    global _fetched
    with _counting:
        before, _fetched = _fetched, _fetched + size
        started = -(-_fetched // CHECK) - -(-before // CHECK)
    if started:
        _grow(started * CHECK)


def _grow(size: int) -> int:
    """Add `size` to the number of bytes in the cache and return it; make room if it is beyond the limit.

    All processes keep one total. The files are counted only if it is not known, or beyond the limit.
    """
    with _folder().with_name("buckets.size").open("a+") as file:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = file.read()
        total = int(known) + size if known.isdecimal() else used()
        if total > _limit(total):
            total = _make_room()
        file.truncate(0)
        file.write(str(total))
    return total


_kept: dict[Path, int] = {}


def _keep(copy: Path) -> None:
    """Make the folder `copy`, which no process removes while this one runs."""
    while True:
        copy.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            file = os.open(copy, os.O_RDONLY)
            with contextlib.suppress(OSError):  # the file system has no locks
                fcntl.flock(file, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(file), copy.stat()):
                break
            os.close(file)
    os.utime(copy)
    with _opening:
        before, _kept[copy] = _kept.get(copy), file
    if before is not None:
        os.close(before)


def _remove(entry: Path) -> bool:
    """Remove a file or a copy; return False if a process uses it."""
    if not entry.is_dir():
        entry.unlink(missing_ok=True)
        return True
    try:
        file = os.open(entry, os.O_RDONLY)
    except FileNotFoundError:  # another process has removed it
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry, ignore_errors=True)
        return True
    except OSError:
        return False
    finally:
        os.close(file)


def _make_room() -> int:
    """Remove what was not used for the longest time until the cache is well within its limit; return its size."""
    sizes = {path: _size(path) for path in _entries()}
    total = sum(sizes.values())
    most = ROOM * _limit(total)

    def last_used(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:  # another process has removed it
            return 0.0

    for path in sorted(sizes, key=last_used):
        if total <= most:
            break
        if _remove(path):
            total -= sizes[path]
    return total
