"""What a run writes down: a line of JSON and a TensorBoard event a metric, and progress for whoever watches."""

import json
import math
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxmm.checkpoints import write_atomically


class MetricLog:
    """`metrics.jsonl` (an object a line: `step` and flat names) and TensorBoard's event files beside it."""

    def __init__(self, workdir: Path, step: int):
        """Goes on after `step`: lines of later steps, from a run that was cut off, are removed."""
        from tensorboardX import SummaryWriter  # seconds of import where torch is installed

        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            write_atomically(self.path, "".join(line + "\n" for line in lines))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """A line, flushed; a value that is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing it
        return math.inf


class Watch:
    """Progress with rate and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int, batch_size: int, start: int, *, quiet: bool = False):
        """`quiet` for all hosts but the first."""
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._steps, self._batch_size, self._start = steps, batch_size, start
        self._since = self._said = time.monotonic()
        self._first = start
        self._bar = None
        if self.console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=steps, completed=start, note="compiling")
            self._bar.start()

    def rate(self, step: int) -> float:
        """Steps a second since the first one was done (which compiles)."""
        return (step - self._first) / max(time.monotonic() - self._since, 1e-9)

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` spent elsewhere (evaluating) out of the rate."""
        self._since += seconds

    def step(self, step: int, loss: float | None) -> None:
        """Step number `step` is done."""
        if step == self._start + 1:
            self._since, self._first = time.monotonic(), step
            return
        rate = self.rate(step)
        left = (self._steps - step) / rate if rate > 0 else math.inf
        note = f"{rate * self._batch_size:,.0f} pictures/s, {duration(left)} left"
        if loss is not None:
            note = f"loss {loss:.4f}, {note}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif time.monotonic() - self._said > 10 or step == self._steps:
            self._said = time.monotonic()
            self.console.print(f"step {step}/{self._steps}: {note}")

    def say(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(message, markup=False)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """`3 h 05 min`, `4 min 10 s`, `12 s`."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
