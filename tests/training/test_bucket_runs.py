"""Runs whose workdir is in a bucket: killed, stopped and with requests that fail, they end as local ones do."""

from contextlib import closing

import pytest

import jaxmm
from jaxmm import checkpoints
from jaxmm.checkpoints import CheckpointError, Checkpoints, whole_steps
from jaxmm.config import MeshConfig
from jaxmm.folder_locks import lock_folder
from jaxmm.paths import local_copy, user_path
from jaxmm.sharding import make_mesh
from jaxmm.validation import ConfigError
from tests.training.common import Killed, assert_same_bits, lines, restored
from tests.training.process import EVERY, STEPS, run
from tests.training.test_checkpoint import DATA, layout, state
from tests.training.test_resume import Trainer, run_killed_in_a_save, run_until_asked_to_stop, used


def assert_same_run(workdir, undisturbed, steps=STEPS):
    """Equal losses, every one once, and the same last state bit for bit."""
    losses = [row for row in lines(undisturbed, "train/loss") if row[0] <= steps]
    assert lines(workdir, "train/loss") == losses and [step for step, _ in losses] == list(range(1, steps + 1))
    assert_same_bits(restored(local_copy(workdir), steps), restored(undisturbed, steps))


def test_killed_in_a_save_with_failing_requests(undisturbed, scenes, gcs, gcs_proxy, tmp_path, monkeypatch):
    """The run that goes on meets failures, too."""
    workdir = user_path(gcs)
    run_killed_in_a_save(workdir, scenes, monkeypatch, ledger=tmp_path)
    assert not whole_steps(workdir / "checkpoints")
    monkeypatch.setattr(gcs_proxy, "plan", [kind for fault in ("status", "reset")
                                            for kind in [*[None] * 19, fault]])
    run(workdir, scenes, ledger=tmp_path, steps=2 * EVERY)
    assert gcs_proxy.plan == []
    assert_same_run(workdir, undisturbed, 2 * EVERY)
    names = {path.relative_to(workdir).parts[0] for path in workdir.files()}
    assert names >= {"config.json", "metrics.jsonl", "tokenizer", "tensorboard", "report.html", "checkpoints"}
    assert jaxmm.load(gcs).num_parameters == jaxmm.load(undisturbed).num_parameters


@pytest.mark.long
def test_killed_stopped_and_with_failing_requests(undisturbed, scenes, gcs, gcs_proxy, tmp_path, monkeypatch, capsys):
    """Killed at random as a process; in a save and when asked to stop in this one; then with 5 % faults."""
    workdir = user_path(gcs)
    trainer = Trainer(workdir, scenes, "--pause", 9, "--ledger", tmp_path, output=tmp_path)
    trainer.wait_for(lambda: len(used(tmp_path)) >= 6)
    assert "from the start" in trainer.kill()
    start = max(whole_steps(workdir / "checkpoints"), default=0)
    run_killed_in_a_save(workdir, scenes, monkeypatch, ledger=tmp_path)
    assert max(whole_steps(workdir / "checkpoints"), default=0) == start
    run_until_asked_to_stop(workdir, scenes, start + 6, monkeypatch, capsys, ledger=tmp_path)
    monkeypatch.setattr(gcs_proxy, "faults", 0.05)
    before = gcs_proxy.failed.total()
    run(workdir, scenes, ledger=tmp_path)
    monkeypatch.setattr(gcs_proxy, "faults", 0.0)
    assert gcs_proxy.failed.total() > before
    assert_same_run(workdir, undisturbed)


def test_checkpoints_in_s3(s3):
    """Arrays go through the local disk; old checkpoints are removed; the newest undamaged one is restored."""
    folder = user_path(s3) / "checkpoints"
    for step in (3, 6, 9):
        with closing(Checkpoints(folder, keep=2)) as opened:
            opened.save(state(step), DATA | {"step": step})
    assert whole_steps(folder) == [6, 9] and not (folder / "3").exists()
    (folder / "9" / "state" / "_METADATA").write_text("damaged")
    with closing(Checkpoints(folder)) as opened:
        like = layout(state(6), make_mesh(MeshConfig(data=1)))
        result, data = opened.restore(like)
    assert data["step"] == 6 and whole_steps(folder) == [6]
    assert_same_bits(result, state(6))


def test_a_save_without_access(gcs, gcs_proxy, monkeypatch):
    """The error names the checkpoint, also if the bucket cannot be asked which ones there are."""
    with closing(Checkpoints(user_path(gcs))) as opened:
        monkeypatch.setattr(gcs_proxy, "always", 403)
        with pytest.raises(CheckpointError, match=f"saving {gcs}/3 failed: no access; complete checkpoints stay"), (
                opened._wrap_errors(user_path(gcs) / "3")):
            raise OSError("no access")


def test_a_bucket_that_gives_no_access_any_more(gcs, gcs_proxy, monkeypatch):
    """A save names the checkpoint. A checkpoint that is complete stays, and is not taken for damaged."""
    folder = user_path(gcs)
    with closing(Checkpoints(folder)) as opened:
        opened.save(state(3), DATA)
        opened.wait()
        with monkeypatch.context() as patch:
            patch.setattr(gcs_proxy, "always", 403)
            for step in (3, 6):
                with pytest.raises(CheckpointError, match=f"saving {gcs}/{step} failed: .*access denied"):
                    opened.save(state(step), DATA)
            with pytest.raises(CheckpointError, match=f"saving {gcs}/3 failed: .*access denied"):
                opened.record_metric(3, 0.5)
            with pytest.raises(OSError, match="access denied"):
                checkpoints.find_damage(folder / "3")
        with monkeypatch.context() as patch:
            patch.setattr(opened, "_prune", lambda: (folder / "none").read_bytes())
            opened.save(state(6), DATA)
            with pytest.raises(CheckpointError, match=f"saving {gcs}/6 failed: {gcs}/none: there is no such object"):
                opened.wait()
    assert whole_steps(folder) == [3, 6] and checkpoints.find_damage(folder / "6") is None


def test_the_first_checkpoint_that_a_listing_lacks(gcs, monkeypatch):
    """It is recorded before old ones, and those that are not the best, are looked for."""
    folder = user_path(gcs)
    monkeypatch.setattr(type(folder), "iterdir", lambda self: iter(()))
    with closing(Checkpoints(folder, best=True)) as opened:
        opened.save(state(3), DATA | {"step": 3})
    assert whole_steps(folder) == [3]


@pytest.mark.long
def test_a_run_in_s3(undisturbed, scenes, s3, tmp_path):
    workdir = user_path(s3)
    with pytest.raises(Killed):
        run(workdir, scenes, ledger=tmp_path, end=EVERY + 3)
    run(workdir, scenes, ledger=tmp_path)
    assert_same_run(workdir, undisturbed)
    assert jaxmm.load(s3).num_parameters == jaxmm.load(undisturbed).num_parameters


def test_damage_and_lost_listings(undisturbed, scenes, gcs, tmp_path, monkeypatch, caplog):
    """A damaged checkpoint is set aside. One that a listing lacks is neither removed nor passed over."""
    workdir, steps = user_path(gcs), [EVERY, 2 * EVERY]
    with pytest.raises(Killed):
        run(workdir, scenes, ledger=tmp_path, end=2 * EVERY + 2)
    folder = workdir / "checkpoints"
    assert whole_steps(folder) == steps
    plain = type(workdir).iterdir
    with monkeypatch.context() as patch:
        patch.setattr(type(workdir), "iterdir", lambda self: (p for p in plain(self) if p.name != str(steps[-1])))
        assert whole_steps(folder) == steps
        checkpoints.Checkpoints(folder).clean()
    assert whole_steps(folder) == steps and checkpoints.find_damage(folder / str(steps[-1])) is None
    [largest] = sorted((folder / str(steps[-1])).files(), key=lambda path: path.stat().st_size)[-1:]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.raises(Killed):
        run(workdir, scenes, ledger=tmp_path, end=2 * EVERY)
    assert f"checkpoint {folder / str(steps[-1])} is damaged" in caplog.text
    assert whole_steps(folder) == steps[:1]


def test_two_runs_do_not_share_a_bucket(scenes, gcs, tmp_path):
    with lock_folder(user_path(gcs)), pytest.raises(ConfigError, match="which another run is writing to"):
        run(user_path(gcs), scenes, ledger=tmp_path)


def test_a_save_that_fails_names_the_object(undisturbed, scenes, gcs, gcs_proxy, tmp_path, monkeypatch):
    plain = checkpoints.digests

    def deny(folder):
        monkeypatch.setattr(gcs_proxy, "always", 403)
        return plain(folder)

    monkeypatch.setattr(checkpoints, "digests", deny)
    monkeypatch.setattr(checkpoints, "whole_steps", lambda folder: [])
    with pytest.raises((CheckpointError, OSError), match=f"{gcs}.*access denied"):
        run(user_path(gcs), scenes, ledger=tmp_path, end=2 * EVERY)
