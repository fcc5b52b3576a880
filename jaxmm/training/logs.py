"""Log a run: `metrics.jsonl`, TensorBoard events, and progress on the terminal."""

import json
import math
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from jaxmm.atomic import write_atomically
from jaxmm.paths import is_bucket


class MetricLog:
    """`metrics.jsonl` (one object per line: `step` and flat names) and TensorBoard's event files beside it."""

    def __init__(self, workdir: Path, step: int):
        """Continue after `step`: lines of later steps, from a run that was interrupted, are removed."""
        from tensorboardX import SummaryWriter  # seconds of import where torch is installed

        self.path = workdir / "metrics.jsonl"
        self._files = UploadedFolder(workdir) if is_bucket(workdir) else None
        folder = workdir if self._files is None else self._files.local
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            write_atomically(folder / self.path.name, "".join(line + "\n" for line in lines))
        self._file = (folder / self.path.name).open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line and flush it; a value that is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._files is not None:
            self._files.upload_soon()

    def flush(self) -> None:
        """Return when everything is in the workdir, also if that is in a bucket."""
        if self._files is not None:
            self._board.flush()
            self._files.upload()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()
        if self._files is not None:
            self._files.close()


class UploadedFolder:
    """A local folder whose files are uploaded to a bucket, which cannot append to an object: again if they grow."""

    def __init__(self, target: Path):
        self.target, self.local = target, Path(tempfile.mkdtemp(prefix="jaxmm-"))
        self._sizes: dict[str, int] = {}
        self._worker = ThreadPoolExecutor(1, "upload")
        self._uploading: Future | None = None
        self._since = time.monotonic()

    def upload_soon(self) -> None:
        """Upload in the background, unless that was done in the last ten seconds."""
        if time.monotonic() - self._since > 10 and (self._uploading is None or self._uploading.done()):
            self._since = time.monotonic()
            self._uploading = self._worker.submit(self._upload)

    def upload(self) -> None:
        """Upload what has changed and return when it is there. Raises `OSError`."""
        self._since = time.monotonic()
        self._worker.submit(self._upload).result()

    def close(self) -> None:
        """Upload what has changed and remove the local folder."""
        try:
            self.upload()
        finally:
            self._worker.shutdown()
            shutil.rmtree(self.local)

    def _upload(self) -> None:
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            if path.is_file() and self._sizes.get(name) != (size := path.stat().st_size):
                (self.target / name).upload(path)
                self._sizes[name] = size


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing it
        return math.inf


class Progress:
    """Progress with speed and time left: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, steps: int, batch_size: int, start: int, *, quiet: bool = False):
        """Start; `quiet` is for all hosts but the first."""
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._steps, self._batch_size, self._start = steps, batch_size, start
        self._since = self._printed = time.monotonic()
        self._first = start
        self._bar = None
        if self.console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=steps, completed=start, note="compiling")
            self._bar.start()

    def steps_per_second(self, step: int) -> float:
        """Return steps per second since the first one was done (which compiles)."""
        return (step - self._first) / max(time.monotonic() - self._since, 1e-9)

    def pause(self, seconds: float) -> None:
        """Leave `seconds` spent elsewhere (evaluating) out of the speed."""
        self._since += seconds

    def step(self, step: int, loss: float | None) -> None:
        """Show that step number `step` is done."""
        if step == self._start + 1:
            self._since, self._first = time.monotonic(), step
            return
        speed = self.steps_per_second(step)
        left = (self._steps - step) / speed if speed > 0 else math.inf
        note = f"{speed * self._batch_size:,.0f} images/s, {duration(left)} left"
        if loss is not None:
            note = f"loss {loss:.4f}, {note}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif time.monotonic() - self._printed > 10 or step == self._steps:
            self._printed = time.monotonic()
            self.console.print(f"step {step}/{self._steps}: {note}")

    def print(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, markup=False)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Return `3 h 05 min`, `4 min 10 s` or `12 s`."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
