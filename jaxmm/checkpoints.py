"""Write and read checkpoints that are complete or not there.

Orbax writes the arrays, asynchronously and sharded. When it is done, a manifest with the digest of every file is
put beside them, and only a folder with a manifest counts: Orbax alone restores an array with a flipped bit without
a warning. Old checkpoints are removed only after the new one is complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmm.atomic import write_atomically
from jaxmm.paths import is_bucket, move_folder, remove_tree
from jaxmm.sharding import named_leaves
from jaxmm.validation import require

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STEPS = "steps.json"
"""A list of the complete steps, in a bucket."""
State = TypeVar("State")
"""A dataclass of arrays that is a pytree and has a field `step`."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names the folder."""


def _orbax() -> Any:
    """Return Orbax, a quarter of a second of import that loading published weights does without."""
    import orbax.checkpoint as ocp

    return ocp


def digests(folder: Path) -> dict[str, str]:
    """Return the BLAKE2b digest of every file under `folder` but the manifest, by path; in a bucket, its checksum."""
    if is_bucket(folder):
        return {path.relative_to(folder).as_posix(): path.checksum() for path in folder.files()
                if path.name != MANIFEST}
    result = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            result[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "blake2b").hexdigest()
    return result


def shapes(state: State) -> dict[str, list]:
    """Return shape and dtype of every array, by path."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(_fields(state))}


def whole_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, oldest first."""
    if is_bucket(folder):  # whose listing may lack new objects; a request for one object does not
        return sorted(int(name) for name in _bucket_names(folder)
                      if name.isdigit() and (folder / name / MANIFEST).exists())
    return sorted(int(p.parent.name) for p in folder.glob(f"*/{MANIFEST}") if p.parent.name.isdigit())


def _bucket_names(folder: Path) -> set[str]:
    """Return the names in a folder of a bucket and those of the steps that the last save recorded."""
    names: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        names |= {path.name for path in folder.iterdir()}
    with contextlib.suppress(FileNotFoundError, ValueError):
        names |= set(map(str, json.loads((folder / STEPS).read_text())))
    return names


def find_damage(folder: Path) -> str | None:
    """Return a description of the damage to the checkpoint in `folder`, or None.

    Raises `OSError` if a bucket gives no access.
    """
    try:
        expected = _read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        if is_bucket(folder) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        return f"{MANIFEST} cannot be read: {error}"
    actual = {} if is_bucket(folder) else digests(folder)
    for name, digest in expected.items():
        try:
            now = (folder / name).checksum() if is_bucket(folder) else actual.get(name)
        except FileNotFoundError:
            now = None
        if now is None:
            return f"{name} is missing"
        if now != digest:
            return f"{name} is not what was written"
    return None


def read_weights(folder: Path, part: str, like: Any, step: int | None = None) -> Any:
    """Read `part` ("params", "average") of the checkpoint of `step` in `folder` (None: the newest), and nothing else.

    The arrays are laid out as `like`. Raises `CheckpointError` if there is no such checkpoint, or it is damaged, or it
    holds other arrays.
    """
    folder, steps = folder.absolute(), whole_steps(folder)
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(f"{folder} holds no whole checkpoint{'' if step is None else f' of step {step}'}; it "
                              f"has {', '.join(map(str, steps)) or 'none'}")
    chosen = folder / str(steps[-1] if step is None else step)
    if damage := find_damage(chosen):
        raise CheckpointError(f"checkpoint {chosen} is damaged: {damage}")
    saved = {name: shape for name, (shape, _) in _read_manifest(chosen)["shapes"].items()
             if name.startswith(f"{part}/")}
    wanted = {f"{part}/{name}": list(leaf.shape) for name, leaf in named_leaves(like)}
    _check_shapes(chosen, saved, wanted)
    ocp = _orbax()
    arguments = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(
        dtype=leaf.dtype, sharding=leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])), like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax, _readable(chosen / "state") as state:
        restored = orbax.restore(state, args=ocp.args.PyTreeRestore(
            item={part: like}, restore_args={part: arguments}, partial_restore=True))
    return restored[part]


class Checkpoints:
    """The checkpoints of one run, in `folder/STEP/`."""

    def __init__(self, folder: Path, *, keep: int = 2, best: bool = False):
        """Keep the newest `keep`, and with `best` also the one with the highest metric."""
        self.folder, self.keep, self.best = folder.absolute(), keep, best  # Orbax takes no relative path
        self.folder.mkdir(parents=True, exist_ok=True)
        self._orbax = _orbax().AsyncCheckpointer(_orbax().StandardCheckpointHandler())
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._primary = jax.process_index() == 0
        self._staged = None
        if _is_staged(self.folder):
            require(jax.process_count() == 1, "workdir", str(folder.parent), "for several hosts, gs:// or a folder "
                    "that they share")
            self._staged = Path(tempfile.mkdtemp(prefix="jaxmm-"))

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return whole_steps(self.folder)

    def describe_last(self) -> str:
        """Return a clause that names the newest complete checkpoint."""
        try:
            steps = self.steps()
        except OSError:  # of a bucket that gives no access
            return "complete checkpoints stay"
        return f"the last whole checkpoint is of step {steps[-1]}" if steps else "there is no whole checkpoint yet"

    def save(self, state: State, data: Any) -> None:
        """Start saving `state` and the data iterator's state `data` (JSON); return when the arrays are copied.

        Raises `CheckpointError` when this save, or the one before it, fails.
        """
        self.wait()
        step = int(jax.device_get(state.step))
        target = self.folder / str(step)
        with self._wrap_errors(target):
            if step in self.steps():
                return
            if self._primary and target.exists():
                remove_tree(target)
            if self._staged is not None or not is_bucket(target):
                needed = sum(leaf.nbytes for _, leaf in named_leaves(_fields(state)))
                free = shutil.disk_usage(self._staged or self.folder).free
                if free < needed:
                    raise OSError(f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free")
            self._orbax.save(_for_orbax((self._staged or target) / "state"),
                             args=_orbax().args.StandardSave(_fields(state)))
        notes = {"step": step, "data": data, "metric": None, "shapes": shapes(state)}
        self._pending = self._worker.submit(self._finish, target, notes)

    def record_metric(self, step: int, metric: float) -> None:
        """Record how good the checkpoint of `step` is (more is better), and remove those it outdoes.

        Raises `CheckpointError` if the manifest cannot be written, or the save before failed.
        """
        self.wait()
        path = self.folder / str(step) / MANIFEST
        with self._wrap_errors(path.parent):
            if self._primary and path.exists():
                write_atomically(path, _signed(_read_manifest(path.parent) | {"metric": metric}))
                self._prune()

    def wait(self) -> None:
        """Return when the last save is complete. Raises `CheckpointError` if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, like: State) -> tuple[State, Any] | None:
        """Return the newest checkpoint, laid out as `like` (arrays or shapes with shardings), and its data state.

        Returns None if there is no checkpoint at all. A damaged one is named, set aside as `STEP.damaged`, and the one
        before it is used. Raises `CheckpointError` if all are damaged, or if the newest holds other arrays than `like`.
        """
        step = self._newest()
        if step is None:
            return None
        folder = self.folder / str(step)
        notes = _read_manifest(folder)
        _check_shapes(folder, notes["shapes"], shapes(like))
        with _readable(folder / "state") as path:
            restored = self._orbax.restore(path, args=_orbax().args.StandardRestore(_fields(like)))
        return type(like)(**restored), notes["data"]

    def _newest(self) -> int | None:
        """Return the newest undamaged step: the first host looks for it and broadcasts it."""
        steps, chosen, damaged = self.steps(), None, []
        for step in reversed(steps) if self._primary else ():
            damage = find_damage(self.folder / str(step))
            if damage is None:
                chosen = step
                break
            log.warning("checkpoint %s is damaged: %s", self.folder / str(step), damage)
            damaged.append(step)
        for step in damaged if chosen is not None else ():  # with none to go on from, they stay where they are
            aside = self.folder / f"{step}.damaged"
            remove_tree(aside, missing_ok=True)
            (self.folder / str(step)).rename(aside)
            log.warning("going on from step %d; the damaged one is now %s", chosen, aside)
        if jax.process_count() > 1:
            common = multihost_utils.broadcast_one_to_all(np.int64(-1 if chosen is None else chosen))
            chosen = None if common < 0 else int(common)
        if chosen is None and steps:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged: {', '.join(map(str, steps))}; move "
                                  "the folder away to start from the beginning")
        return chosen

    def clean(self) -> None:
        """Remove what interrupted saves left. Only for the run that has locked the workdir."""
        complete = {str(step) for step in self.steps()}
        names = _bucket_names(self.folder) if is_bucket(self.folder) else {path.name for path in self.folder.iterdir()}
        for path in (self.folder / name for name in sorted(names - complete)):
            if self._primary and path.is_dir() and not path.name.endswith(".damaged"):
                log.warning("removing %s, which an interrupted save left unfinished", path)
                remove_tree(path)

    def close(self) -> None:
        """Wait for the last save and end the threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()
            if self._staged is not None:
                shutil.rmtree(self._staged, ignore_errors=True)

    def _finish(self, target: Path, notes: dict) -> None:
        with self._wrap_errors(target):
            self._orbax.wait_until_finished()
            if self._staged is not None:
                move_folder(self._staged / "state", target / "state")
            if self._primary:
                write_atomically(target / MANIFEST, _signed(notes | {"files": digests(target)}))
                if is_bucket(self.folder):
                    write_atomically(self.folder / STEPS, json.dumps(sorted({*self.steps(), notes["step"]})))
                self._prune()

    def _prune(self) -> None:
        """Remove complete checkpoints that are neither among the newest nor the best."""
        steps = self.steps()
        kept = set(steps[-self.keep:])
        if self.best:
            def metric(step):
                try:
                    value = _read_manifest(self.folder / str(step))["metric"]
                except ValueError:  # damaged
                    value = None
                return -math.inf if value is None or math.isnan(value) else value
            kept.add(max(reversed(steps), key=metric))
        for step in set(steps) - kept:
            folder = self.folder / str(step)
            try:
                (folder / MANIFEST).unlink()  # first, so that a removal cut short leaves no complete one
                remove_tree(folder)
            except OSError as error:
                log.warning("the old checkpoint %s could not be removed: %s", folder, error)

    @contextlib.contextmanager
    def _wrap_errors(self, target: Path) -> Iterator[None]:
        """Turn an error of a save into one `CheckpointError`, and remove a folder without a manifest."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):  # what is left, the next run removes
                if not (target / MANIFEST).exists():
                    remove_tree(target, missing_ok=True)
                for left in target.parent.glob(f"{target.name}*tmp*"):
                    remove_tree(left)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"saving {target} failed: {reason}; {self.describe_last()}") from error


def _is_staged(folder: Path) -> bool:
    """Return whether Orbax cannot write to `folder`: arrays go through a folder on the local disk."""
    return os.fspath(folder).startswith("s3://")


def _for_orbax(path: Path) -> Any:
    """Return `path` as Orbax reads it."""
    return str(path) if is_bucket(path) else path


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[Any]:
    """Yield the folder of arrays as Orbax can read it."""
    if not _is_staged(folder):
        yield _for_orbax(folder)
        return
    with tempfile.TemporaryDirectory(prefix="jaxmm-") as local:
        for path in folder.files():
            target = Path(local) / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.download(target)
        yield Path(local)


def _signed(notes: dict[str, Any]) -> str:
    """Return a manifest's text, with a digest of its contents."""
    notes = {name: value for name, value in notes.items() if name != "seal"}
    digest = hashlib.blake2b(json.dumps(notes, sort_keys=True).encode()).hexdigest()
    return json.dumps(notes | {"seal": digest})


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the contents of the manifest in `folder`. Raises ValueError if they are not what was written."""
    notes = json.loads((folder / MANIFEST).read_text())
    if not isinstance(notes, dict) or _signed(notes) != json.dumps(notes):
        raise ValueError("it is not what was written")
    return notes


def _fields(state: State) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _check_shapes(folder: Path, saved: dict[str, list], wanted: dict[str, list]) -> None:
    problems = [f"{name}: the checkpoint has {saved.get(name)}, this run {wanted.get(name)}"
                for name in sorted(set(saved) | set(wanted)) if saved.get(name) != wanted.get(name)]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"checkpoint {folder} holds other arrays than this run:\n  "
                              + "\n  ".join(problems[:10]) + more)
