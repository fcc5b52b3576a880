"""Several processes train as one does, and end together when one of them dies, fails or is stuck."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jaxmm.checkpoints import whole_steps
from jaxmm.data.pipeline import step_records
from jaxmm.hosts import clusters
from jaxmm.hosts.heartbeat import LONG, STATUS, Heartbeat, HostStatus, caused_elsewhere, detect_failure
from jaxmm.hosts.startup import HostsConfig, count_hosts, detect_process_count, join
from jaxmm.sharding import named_leaves
from jaxmm.validation import ConfigError
from tests.training.common import assert_same_bits, lines
from tests.training.hosts import EVERY, STEPS, config

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds that processes may take for what takes some."""
HEARTBEAT, TIMEOUT = 6.0, 7.0
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-003]", "SLURM_NTASKS": "3", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0"}


class Nursery:
    """A process that has imported everything, and those that it forks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, "-m", "tests.training.hosts"], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=os.environ | {"JAX_PLATFORMS": "cpu"})

    def ask(self, **order) -> int:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, out: str, runs: str, count: int, devices: int, *options: object) -> "Run":
        """`count` processes with `devices` each, whose work folders are in `out`."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        return Run(self, out, [self.ask(
            args=[str(entry) for entry in (self.folder, runs, out, *options)]
            + (["--hosts", address, str(count), str(host)] if count > 1 else []),
            devices=devices, output=str(self.folder / f"{out}-{host}.txt")) for host in range(count)])

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(PATIENCE) == 0


class Run:
    """Processes of one run, by the host's index."""

    def __init__(self, nursery, out, numbers):
        self.nursery, self.out, self.numbers, self.running = nursery, out, numbers, set(numbers)

    def text(self, host: int) -> str:
        return (self.nursery.folder / f"{self.out}-{host}.txt").read_text()

    def steps(self, host: int) -> list[list[int]]:
        """Return the records that a host used, one list per step."""
        path = self.nursery.folder / self.out / f"steps-{host}"
        rows = path.read_text().split("\n")[:-1] if path.exists() else []
        return [(int(row.split()[0]), json.loads(row.partition(" ")[2])) for row in rows]

    def reaches(self, host: int, step: int) -> None:
        """Returns once `host` is in `step`."""
        deadline = time.monotonic() + PATIENCE
        while not any(entry == step for entry, _ in self.steps(host)):
            assert time.monotonic() < deadline, self.text(host)
            time.sleep(0.01)

    def kill(self, host: int) -> None:
        os.kill(self.numbers[host], signal.SIGKILL)

    def status(self, host: int) -> int:
        """Waits for the end of `host`; kills it when that takes too long."""
        number = self.numbers[host]
        alarm = threading.Timer(PATIENCE, os.kill, (number, signal.SIGKILL))
        alarm.start()
        status = self.nursery.ask(wait=number)
        self.running.discard(number)
        alarm.cancel()
        return status

    def ends(self) -> "Run":
        """All of them, and well."""
        for host in range(len(self.numbers)):
            assert self.status(host) == 0, self.text(host)
        return self


@pytest.fixture(scope="module")
def nursery(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "data").symlink_to(scenes)
    rng = np.random.default_rng(0)
    for split, count, broken in (("train", 3, {1}), ("val", 5, {2, 3})):
        for i in range(count):
            path = folder / "few" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
            if i in broken:
                path.write_bytes(b"<html>")
    nursery = Nursery(folder)
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def runs(nursery):
    """Return `runs(name, count)`: that run on four devices by that number of processes, made once."""
    return cache(lambda name, count: nursery.start(
        f"{name}-of-{count}", name, count, 4 // count, "--heartbeat", 60).ends())


def arrays(workdir: Path, step: int):
    """The state of a checkpoint, whatever wrote it."""
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                             reader.metadata(path).item_metadata.tree)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))


def difference(one: Path, other: Path) -> float:
    """The largest of all metrics (relative) and of the final state (absolute)."""
    values = []
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a.keys() == b.keys()
        values += [abs(a[name] - b[name]) / max(1, abs(a[name])) for name in a if "pictures_per_second" not in name]
    states = [dict(named_leaves(arrays(entry, STEPS))) for entry in (one, other)]
    assert states[0].keys() == states[1].keys()
    return max(values + [float(np.abs(value.astype(float) - states[1][name]).max())
                        for name, value in states[0].items()])


@pytest.mark.parametrize("name, count", [
    ("few", 2), *(pytest.param(*entry, marks=pytest.mark.long) for entry in (
        ("few", 4), *itertools.product(("clip", "siglip", "blip"), (2, 4))))])
def test_several_processes_train_and_evaluate_as_one(runs, nursery, name, count, record_property):
    one, several = (nursery.folder / runs(name, entry).out / name for entry in (1, count))
    assert [row["step"] for row in lines(several) if "train/loss" in row] == list(range(1, STEPS + 1))
    assert any(key.startswith("val/") for key in lines(several)[-1])
    largest = difference(one, several)
    record_property(f"{name}, {count} processes and one, largest difference", f"{largest:.1e}")
    assert largest < 1e-5
    assert (several / "report.html").exists()
    for host in range(1, count):
        assert "training records" not in runs(name, count).text(host)      # progress comes from the first alone


@pytest.mark.parametrize("name, count, length, broken", [
    ("few", 2, 3, 2), *(pytest.param(*entry, marks=pytest.mark.long) for entry in (
        ("few", 4, 3, 2), ("clip", 2, 160, None)))])
def test_every_host_reads_its_share_and_as_many_steps(runs, nursery, name, count, length, broken):
    """Also of three records, one of which is broken, for four hosts (`long`)."""
    run, steps = config(name, nursery.folder), [runs(name, count).steps(host)[:STEPS] for host in range(count)]
    assert all([step for step, _ in entry] == list(range(1, STEPS + 1)) for entry in steps)
    for step in range(STEPS):
        used = np.concatenate([entry[step][1] for entry in steps])
        drawn = step_records(length, run.data.batch_size, run.seed, step)
        np.testing.assert_array_equal(used[drawn != broken], drawn[drawn != broken])
        assert len(used) == len(drawn) and broken not in used              # another one is in its place


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_bad_record_is_counted_once(runs, nursery, count):
    bad = lines(nursery.folder / runs("few", count).out / "few", "data/bad_records")
    assert bad == lines(nursery.folder / runs("few", 1).out / "few", "data/bad_records") and bad[-1][1] > STEPS
    assert "2 of 5 records were bad" in runs("few", count).text(count - 1)


@pytest.mark.parametrize("wrote, count, devices", [
    (2, 1, 4), *(pytest.param(*entry, marks=pytest.mark.long) for entry in ((4, 1, 4), (4, 2, 2)))])
def test_what_several_wrote_others_go_on_with(runs, nursery, wrote, count, devices):
    out = f"from-{wrote}-{count}"
    shutil.copytree(nursery.folder / runs("few", wrote).out / "few", nursery.folder / out / "few")
    shutil.rmtree(nursery.folder / out / "few" / "checkpoints" / str(STEPS))
    went_on = nursery.start(out, "few", count, devices).ends()
    assert f"going on after step {STEPS - EVERY}" in went_on.text(0)
    assert difference(nursery.folder / runs("few", 1).out / "few", nursery.folder / out / "few") < 1e-5


@pytest.mark.parametrize("dies", [(0,), pytest.param((1, 0), marks=pytest.mark.long)], ids=str)
def test_a_run_whose_hosts_hang_and_die_ends_each_time_and_goes_on_exactly(runs, nursery, dies, record_property):
    """The first host runs the service that the others watch; of the death of another one the first tells (`long`)."""
    out = f"again-{len(dies)}"
    limits = ("--heartbeat", HEARTBEAT, "--timeout", TIMEOUT)
    name = re.escape(socket.gethostname())

    stuck = nursery.start(out, "few", 2, 2, *limits, "--block", 1, 3)
    stuck.reaches(1, 3)
    since = time.monotonic()
    assert [stuck.status(host) for host in (0, 1)] == [STATUS, STATUS]
    took = time.monotonic() - since
    record_property("seconds until a host that hung ended the run", f"{took:.1f} (limit {TIMEOUT:.0f})")
    assert TIMEOUT < took < TIMEOUT + HEARTBEAT + 5
    for host in (0, 1):
        assert re.search(rf"^error: host 1 \({name}\) is stuck; last seen training at step 3, \d+ s ago\. ",
                         stuck.text(host), re.M), stuck.text(host)
    assert "in observe" in stuck.text(1) and "in observe" not in stuck.text(0)  # where it hangs

    for killed in dies:
        other = 1 - killed
        run = nursery.start(out, "few", 2, 2, *limits, "--block", killed, STEPS)
        run.reaches(killed, STEPS)
        run.kill(killed)
        since = time.monotonic()
        assert run.status(other) == STATUS, run.text(other)
        took = time.monotonic() - since
        record_property(f"seconds until the death of host {killed} ended the run", f"{took:.1f}")
        assert took < HEARTBEAT + 10
        assert run.status(killed) == -signal.SIGKILL
        (line,) = [line for line in run.text(other).splitlines() if line.startswith("error: ")]
        assert re.match(rf"error: host {killed} \({name}\) is dead or cut off: .*; last seen [a-z ]+ at step \d, "
                        rf"\d+ s ago\. Host {other} ends with it; the same command", line)
        assert whole_steps(nursery.folder / out / "few" / "checkpoints") == [EVERY]

    last = nursery.start(out, "few", 2, 2).ends()
    assert f"going on after step {EVERY}" in last.text(0)
    again, undisturbed = (nursery.folder / entry / "few" for entry in (out, runs("few", 2).out))
    assert lines(again, "train/loss") == lines(undisturbed, "train/loss")
    assert_same_bits(arrays(again, STEPS), arrays(undisturbed, STEPS))


def test_all_hosts_stop_after_the_same_step_if_one_is_asked_to(nursery):
    run = nursery.start("endless", "few", 2, 2, "--endless")
    run.reaches(1, 2)
    os.kill(run.numbers[1], signal.SIGTERM)
    assert [run.status(host) for host in (0, 1)] == [0, 0], run.text(0) + run.text(1)
    last, = {run.steps(host)[-1][0] for host in (0, 1)}
    assert whole_steps(nursery.folder / "endless" / "few" / "checkpoints") == [last]
    assert f"stopped after step {last} as asked, everything is saved" in run.text(0)


def test_a_host_with_another_configuration_is_named(nursery):
    odd = nursery.start("odd", "few", 2, 1, "--odd", 1)
    assert (odd.status(0), odd.status(1)) == (STATUS, 2)
    assert re.search(r"error: this host has another configuration than the first one:\n  config\.seed was 3 and is 99$",
                     odd.text(1), re.M)
    assert re.search(r"error: host 1 \(.*\) failed .*ConfigError: this .*seed was 3 and is 99\. Host 0 ends with it$",
                     odd.text(0), re.M)
    assert not (nursery.folder / "odd" / "few" / "config.json").exists()


@pytest.mark.parametrize("fields, message", [
    ({"address": "a:1"}, r"hosts\.count is None; expected the number of processes, with hosts\.address"),
    ({"address": "a:1", "count": 2}, r"hosts\.index is None; expected the number of this process, 0 to 1"),
    ({"address": "a:1", "count": 2, "index": 2}, r"hosts\.index is 2; expected .* 0 to 1"),
    ({"address": "a:1", "count": 2, "index": -1}, r"hosts\.index is -1"),
    ({"address": "a", "count": 2, "index": 0}, r"hosts\.address is 'a'; expected HOST:PORT"),
    ({"address": "a:99999", "count": 2, "index": 0}, r"hosts\.address is 'a:99999'"),
    ({"count": 2, "index": 0}, r"hosts\.index is 0; expected hosts\.address and hosts\.count with it"),
    ({"count": 0}, r"hosts\.count is 0"), ({"timeout": 0.0}, r"hosts\.timeout is 0"),
    ({"heartbeat": float("inf")}, r"hosts\.heartbeat is inf"),
    ({"alone": True, "count": 2}, r"hosts\.count is 2; expected nothing with hosts\.alone"),
], ids=str)
def test_half_of_what_has_to_be_said_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        HostsConfig(**fields)


def test_clusters_are_recognised_and_one_machine_is_alone(monkeypatch, tmp_path):
    assert detect_process_count() == count_hosts(HostsConfig()) == count_hosts(HostsConfig(count=1)) == 1
    with pytest.raises(ConfigError, match=r"hosts\.count is 3; expected 1, which JAX found here"):
        count_hosts(HostsConfig(count=3), tmp_path)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert detect_process_count() == 3 and count_hosts(HostsConfig(alone=True)) == 1
    with pytest.raises(ConfigError, match=r"hosts\.count is 4; expected 3"):
        count_hosts(HostsConfig(count=4), tmp_path)
    with pytest.raises(ConfigError, match=r"out is None; expected one folder for all 3 hosts"):
        count_hosts(HostsConfig(), name="out")
    with pytest.raises(ConfigError, match=r"the 3 hosts of this run do not come together: .*before any JAX calls"):
        jax.devices()
        join(HostsConfig(), 3)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert detect_process_count() == count_hosts(HostsConfig()) == 1
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(ConfigError, match=r"SLURM\), but it cannot be asked: .*'many'.* --hosts.alone"):
        detect_process_count()


def test_a_pod_that_is_not_of_an_indexed_job_is_alone(monkeypatch, tmp_path):
    """The package `kubernetes` is asked as JAX asks it."""
    def find(namespace, field_selector):
        assert (namespace, field_selector) == ("research", "status.podIP=127.0.0.1")
        return SimpleNamespace(items=[SimpleNamespace(metadata=SimpleNamespace(labels={"job-name": "clip"}))])

    def read(name, namespace):
        assert (name, namespace) == ("clip", "research")
        return SimpleNamespace(spec=SimpleNamespace(parallelism=5))

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("HOSTNAME", "127.0.0.1")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert detect_process_count() == 1                                     # without the package
    package = ModuleType("kubernetes")
    package.__spec__ = ModuleSpec("kubernetes", None)
    package.config = SimpleNamespace(load_incluster_config=lambda: None)
    package.client = SimpleNamespace(CoreV1Api=lambda: SimpleNamespace(list_namespaced_pod=find),
                                     BatchV1Api=lambda: SimpleNamespace(read_namespaced_job=read))
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    (tmp_path / "namespace").write_text("research\n")
    monkeypatch.setattr(clusters, "KUBERNETES_NAMESPACE", tmp_path / "namespace")
    assert detect_process_count() == 1
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert detect_process_count() == 5


def test_the_only_worker_of_a_slice_is_alone(monkeypatch):
    def nobody(key):
        raise OSError("no metadata server")

    monkeypatch.setattr(clusters, "metadata", nobody)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert detect_process_count() == 1
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "3")
    assert detect_process_count() == 6
    monkeypatch.delenv("MEGASCALE_NUM_SLICES")
    with pytest.raises(ConfigError, match=r"TPU workers.*no metadata server"):
        detect_process_count()


def test_a_pod_of_tpus_is_counted_by_its_metadata(monkeypatch):
    attributes = {"agent-worker-number": "1", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}
    monkeypatch.setattr(clusters, "metadata", attributes.get)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert detect_process_count() == 1                                     # no TPU here
    monkeypatch.setattr(clusters, "has_tpu", lambda: True)
    assert detect_process_count() == 2
    attributes["tpu-env"] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '4'"
    assert detect_process_count() == 8
    del attributes["agent-worker-number"]
    assert detect_process_count() == 1


def test_open_mpi_says_how_many(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "12")
    assert detect_process_count() == 12


def seen(alive=0.0, moved=0.0, failed=None, **pulse):
    """Return the status, at second 1000, of a host that lived, moved and failed this many seconds before."""
    return HostStatus(Heartbeat("worker", failed=None if failed is None else "JaxRuntimeError: x", **pulse),
                      1000 - alive,
                1000 - moved, None if failed is None else 1000 - failed)


@pytest.mark.parametrize("hosts, named", [
    ([{"alive": 59, "moved": 299, "phase": "training"}] * 2, None),
    ([{}, {"alive": 61}, {"alive": 70}], (2, "is dead or cut off: no sign of life for 70 s; last seen starting at")),
    ([{"failed": 1}, {"alive": 9}], None),                                 # five beats of two seconds
    ([{"failed": 1}, {"alive": 11, "moved": 12}], (1, "is dead")),         # a failed collective is a hint
    ([{"failed": 19, "alive": 2}, {"failed": 15}], None),
    ([{"failed": 15}, {"failed": 21, "step": 4}], (1, "failed: JaxRuntimeError: x; last seen starting at step 4, 0 s")),
    ([{"moved": 301, "phase": "training", "blocking": True, "step": 5},
      {"moved": 301, "phase": "reading data", "step": 4}], (1, "is stuck; last seen reading data at step 4, 301 s")),
    ([{"moved": 350, "phase": "training", "step": 6}, {"moved": 301, "phase": "training", "step": 5}], (1, "is stuck")),
    ([{"moved": 302, "phase": "training", "blocking": True}, {"moved": 299, "phase": "training"}], None),
    ([{"moved": 900, "phase": "training", "blocking": True}, {"moved": 900, "phase": "saving"}], None),
    ([{"moved": 2000, "phase": "training", "blocking": True}, {"moved": 300 * LONG + 1, "phase": "compiling"}],
     (1, "is stuck; last seen compiling")),
    ([{"moved": 301, "phase": "training", "blocking": True, "step": 2},
      {"moved": 302, "phase": "training", "blocking": True, "step": 2}], (1, "is stuck, like all others")),
    ([{"moved": 301, "phase": "training", "blocking": True},
      {"moved": 301, "phase": "evaluating", "blocking": True}], None),
], ids=str)
def test_who_ends_a_run(hosts, named):
    verdict = detect_failure([seen(**entry) for entry in hosts], 1000.0, timeout=300.0, heartbeat=60.0, interval=2.0)
    if named is None:
        assert verdict is None
    else:
        assert (verdict.host, verdict.name) == (named[0], "worker") and verdict.what.startswith(named[1])
        assert verdict.stuck == named[1].startswith("is stuck")


def test_what_is_told_twice_is_no_sign_of_life():
    first = seen(alive=5, moved=7, beats=3, progress=2)
    same = first.updated(first.heartbeat, 1000.0)
    assert (same.alive, same.moved) == (995, 993)
    later = first.updated(Heartbeat("worker", beats=4, progress=2, failed="x"), 1000.0)
    assert (later.alive, later.moved, later.failed) == (1000, 993, 1000)
    assert later.updated(Heartbeat("worker", beats=5, progress=3, failed="x"), 1001.0).failed == 1000


def test_errors_that_a_dead_host_causes_are_known():
    try:
        try:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
        except RuntimeError as error:
            raise OSError("saving failed") from error
    except OSError as error:
        assert caused_elsewhere(error)
    assert caused_elsewhere(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
    assert not caused_elsewhere(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not caused_elsewhere(ConfigError("steps is 0"))
