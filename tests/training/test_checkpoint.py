import errno
import json
import logging
import resource
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm import atomic
from jaxmm import checkpoints as checkpoint
from jaxmm.checkpoints import MANIFEST, CheckpointError, Checkpoints, find_damage, write_atomically
from jaxmm.config import MeshConfig
from jaxmm.sharding import make_mesh, shardings
from jaxmm.training.state import State
from tests.training.common import assert_same_bits, leaves

DATA = {"step": 3, "seed": 1, "fingerprint": "f"}


def state(step, *, width=16, average=True):
    """A state with the dtypes and empty parts of real ones."""
    rng = np.random.default_rng(step)
    params = {"mlp": {"up": {"kernel": jnp.asarray(rng.normal(size=(24, width)), jnp.float32),
                             "bias": jnp.asarray(rng.normal(size=width), jnp.float32)}},
              "logit_scale": jnp.float32(rng.normal())}
    moments = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return State(step=jnp.int32(step), params=params, opt=({"mu": moments, "count": jnp.int32(step)}, ()), extra={},
                 average=jax.tree.map(lambda x: 2 * x, params) if average else None, skips=jnp.int32(0))


def layout(like, mesh):
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like,
                        shardings(like, mesh))


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=1))


@pytest.fixture
def make(tmp_path):
    """Checkpoints of a run in `tmp_path`, closed at the end."""
    opened = []

    def make(**options):
        opened.append(Checkpoints(tmp_path / "checkpoints", **options))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


@pytest.fixture
def three(make):
    """Whole checkpoints of steps 3, 6 and 9."""
    checkpoints = make(keep=3)
    for step in (3, 6, 9):
        checkpoints.save(state(step), DATA | {"step": step})
    checkpoints.wait()
    return checkpoints


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("average", [True, False])
def test_what_is_restored_is_what_was_saved(make, mesh, average):
    checkpoints, saved = make(), state(7, average=average)
    assert checkpoints.restore(layout(saved, mesh)) is None
    checkpoints.save(saved, DATA)
    checkpoints.wait()
    restored, data = checkpoints.restore(layout(saved, mesh))
    assert_same_bits(restored, saved)
    assert data == DATA and checkpoints.steps() == [7]


def test_another_mesh_restores_the_same(make, mesh):
    checkpoints, saved = make(), state(7)
    cut = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    checkpoints.save(jax.device_put(saved, shardings(saved, cut)), DATA)
    checkpoints.wait()
    for where in (mesh, cut, make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))):
        restored, _ = checkpoints.restore(layout(saved, where))
        assert_same_bits(restored, saved)
        kernel = restored.params["mlp"]["up"]["kernel"]
        assert kernel.sharding == shardings(saved, where).params["mlp"]["up"]["kernel"]


def test_training_on_does_not_change_what_is_being_saved(make, mesh):
    big = jax.device_put({"kernel": jnp.arange(2**21, dtype=jnp.float32)}, mesh.devices.item())
    saved = state(1).replace(params=big)
    wanted = leaves(saved.params)
    advance = jax.jit(lambda s: s.replace(step=s.step + 1, params=jax.tree.map(lambda x: x * 1.5 + 1, s.params)),
                      donate_argnums=0)
    checkpoints, shapes = make(), layout(saved, mesh)
    checkpoints.save(saved, DATA)
    moving = saved
    for _ in range(20):
        moving = advance(moving)
    assert int(moving.step) == 21
    checkpoints.wait()
    restored, _ = checkpoints.restore(shapes)
    np.testing.assert_array_equal(restored.params["kernel"], wanted[0])


def test_the_newest_and_the_best_are_kept(make):
    checkpoints = make(keep=2, best=True)
    for step, metric in ((1, 0.2), (2, 0.9), (3, float("nan")), (4, 0.4), (5, 0.9), (6, None), (7, 0.1), (8, 0.3)):
        checkpoints.save(state(step), DATA)
        if metric is not None:
            checkpoints.record_metric(step, metric)
    checkpoints.wait()
    assert checkpoints.steps() == [5, 7, 8]                                # of two that are best, the newer
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["5", "7", "8"]
    assert [find_damage(checkpoints.folder / str(step)) for step in (5, 7, 8)] == [None] * 3


def test_only_the_newest_are_kept_without_a_metric(make):
    checkpoints = make(keep=1)
    for step in (1, 2, 3):
        checkpoints.save(state(step), DATA)
        checkpoints.save(state(step), DATA)                                # the same step again is no new one
    checkpoints.wait()
    assert checkpoints.steps() == [3]


def test_a_flipped_bit_in_any_file_is_found(three, mesh):
    folder = three.folder / "9"
    rng = np.random.default_rng(0)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) > 3 and folder / MANIFEST in files
    for path in files:
        contents = path.read_bytes()
        for _ in range(20 if path.name == MANIFEST else 2):
            flip(path, int(rng.integers(len(contents))), int(rng.integers(8)))
            damage = find_damage(three.folder / "9")
            name = path.relative_to(folder).as_posix()
            assert damage is not None and (name in damage or path.name == MANIFEST), (name, damage)
            path.write_bytes(contents)
    assert find_damage(three.folder / "9") is None


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(three, mesh, how, caplog):
    file = max((p for p in (three.folder / "9" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    match how:
        case "flipped":
            flip(file, file.stat().st_size // 2)
        case "truncated":
            file.write_bytes(file.read_bytes()[:-1])
        case "missing":
            file.unlink()
        case "manifest":
            file = three.folder / "9" / MANIFEST
            file.write_bytes(file.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        restored, data = three.restore(layout(state(6), mesh))
    assert_same_bits(restored, state(6))
    assert data["step"] == 6 and three.steps() == [3, 6]
    assert str(three.folder / "9") in caplog.text and file.name in caplog.text
    assert (three.folder / "9.damaged").is_dir()
    three.clean()
    assert (three.folder / "9.damaged").is_dir()                           # for whoever wants to look


def test_what_has_no_manifest_does_not_count_and_is_removed(three, mesh):
    (three.folder / "9" / MANIFEST).unlink()
    (three.folder / "12.orbax-checkpoint-tmp").mkdir()
    assert three.steps() == [3, 6]
    three.clean()
    assert sorted(p.name for p in three.folder.iterdir()) == ["3", "6"]
    assert three.restore(layout(state(6), mesh))[1]["step"] == 6


def test_all_damaged_is_an_error_every_time(three, mesh):
    for step in (3, 6, 9):
        flip(three.folder / str(step) / MANIFEST, 5)
    for _ in range(2):                                                     # the second start must not begin anew
        with pytest.raises(CheckpointError, match=f"every checkpoint in {three.folder} is damaged: 3, 6, 9"):
            three.restore(layout(state(6), mesh))


def test_other_arrays_are_listed_in_one_error(three, mesh):
    other = state(9, width=32, average=False)
    with pytest.raises(CheckpointError) as caught:
        three.restore(layout(other, mesh))
    text = str(caught.value)
    assert str(three.folder / "9") in text
    assert "params/mlp/up/kernel: the checkpoint has [[24, 16], 'float32'], this run [[24, 32], 'float32']" in text
    assert "average/logit_scale: the checkpoint has [[], 'float32'], this run None" in text
    assert three.steps() == [3, 6, 9]


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def limit_file_size(monkeypatch):
    """Makes writing fail as it does on a full disk, in whatever language: no file may grow beyond 200 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    return lambda: None


@pytest.mark.parametrize("how", ["free space", "at once", "while writing", "limit", "manifest"])
def test_a_failed_save_says_so_and_loses_nothing(three, mesh, monkeypatch, how):
    undo = lambda: None  # noqa: E731
    match how:
        case "free space":
            undo = full(monkeypatch)
        case "at once":
            monkeypatch.setattr(three._orbax, "save", fail)
        case "while writing":
            monkeypatch.setattr(three._orbax, "wait_until_finished", fail)
        case "limit":
            undo = limit_file_size(monkeypatch)
        case "manifest":
            monkeypatch.setattr(checkpoint, "write_atomically", fail)
    try:
        with pytest.raises(CheckpointError) as caught:
            three.save(state(12), DATA)
            three.wait()
    finally:
        undo()
        monkeypatch.undo()
    text = str(caught.value)
    assert f"saving {three.folder / '12'} failed" in text and "the last whole checkpoint is of step 9" in text
    assert {"free space": "MiB are free", "limit": ""}.get(how, "No space left on device") in text
    assert len(text.splitlines()) == 1
    assert sorted(p.name for p in three.folder.iterdir()) == ["3", "6", "9"]
    assert_same_bits(three.restore(layout(state(9), mesh))[0], state(9))
    three.save(state(15), DATA)                                            # when there is room again
    three.wait()
    assert three.steps() == [6, 9, 15]


def test_the_first_save_failing_says_that_there_is_none(make, monkeypatch):
    checkpoints = make()
    monkeypatch.setattr(checkpoints._orbax, "save", fail)
    with pytest.raises(CheckpointError, match="there is no whole checkpoint yet"):
        checkpoints.save(state(1), DATA)


def test_an_old_one_that_cannot_go_does_not_cost_the_new_one(make, monkeypatch, caplog):
    checkpoints = make(keep=1)
    checkpoints.save(state(1), DATA)
    checkpoints.wait()
    monkeypatch.setattr(checkpoint.shutil, "rmtree", fail)
    checkpoints.save(state(2), DATA)
    checkpoints.wait()
    assert checkpoints.steps() == [2] and find_damage(checkpoints.folder / "2") is None
    assert "could not be removed" in caplog.text


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    write_atomically(path, json.dumps({"a": 1}))
    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(OSError):
        write_atomically(path, "half of")
    assert json.loads(path.read_text()) == {"a": 1}
