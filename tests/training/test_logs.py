import json
import struct

import numpy as np
import pytest

from jaxmm.training.logs import MetricLog, Progress, duration
from tests.training.common import lines


def records(path):
    """The payloads of a TFRecord file: length, its checksum, payload, its checksum."""
    data, payloads = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert len(data) >= length + 16
        payloads.append(data[12:12 + length])
        data = data[16 + length:]
    return payloads


def write(folder, steps, start=0):
    log = MetricLog(folder, start)
    for step in steps:
        log.write(step, {"train/loss": 1 / step, "train/grad_norm": float(step)})
    log.close()


def test_a_line_a_step_and_null_for_what_json_cannot_say(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.write(1, {"train/loss": 0.25, "val/top1": float("nan")})
    assert lines(tmp_path) == [{"step": 1, "train/loss": 0.25, "val/top1": None}]        # flushed, not yet closed
    log.write(2, {"train/loss": float("inf")})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()][1] == {
        "step": 2, "train/loss": None}


def test_going_on_forgets_what_came_after_and_what_was_cut_off(tmp_path):
    write(tmp_path, range(1, 7))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    write(tmp_path, (5, 6), start=4)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    path.write_text(path.read_text().removesuffix("\n"))                  # killed between a line and its end
    write(tmp_path, (7,), start=6)
    assert lines(tmp_path, "train/loss") == [(step, 1 / step) for step in range(1, 8)]
    assert list(tmp_path.glob("*.part")) == []


def test_event_files_hold_every_value(tmp_path):
    write(tmp_path, (1, 2, 3))
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [e for e in records(path) if b"train/" in e]
    assert [b"train/loss" in e for e in events] == [True, False] * 3
    for step, event in enumerate(events[::2], 1):
        assert struct.pack("<f", 1 / step) in event and bytes([0x10, step]) in event    # field 2, step, as a varint


def test_event_files_say_from_where_a_run_went_on(tmp_path):
    write(tmp_path, (5,), start=4)
    (path,) = (tmp_path / "tensorboard").iterdir()
    start = bytes([0x10, 5, 0x3A, 2, 8, 1])                                # step 5; session log: status START
    assert [start in e for e in records(path)].count(True) == 1            # TensorBoard drops what it has from step 5


@pytest.mark.parametrize("seconds, text", [
    (0, "0 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (250, "4 min 10 s"), (3599.7, "1 h 00 min"),
    (11_100, "3 h 05 min"), (np.inf, "unknown time"), (np.nan, "unknown time")])
def test_durations(seconds, text):
    assert duration(float(seconds)) == text


def test_progress_names_loss_rate_and_time_left(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("jaxmm.training.logs.time.monotonic", lambda: clock[0])
    watch = Progress(100, 32, 10)
    clock[0] = 50.0                                                        # the first step compiles and does not count
    watch.step(11, None)
    for step in range(12, 22):
        clock[0] += 2.0
        watch.step(step, 0.5)
    clock[0] += 1000
    watch.pause(1000.0)
    assert watch.steps_per_second(21) == pytest.approx(0.5)
    watch.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "step 12/100: loss 0.5000, 16 images/s, 2 min 56 s left"
    assert said[-1].startswith("step 18/100")                              # no more than one in ten seconds
