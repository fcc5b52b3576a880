"""The whole of it: pre-train, fine-tune a captioner and a filter, make the data better, pre-train anew on it.

Li et al. 2022, section 3.3 and figure 3: the captioner and the filter begin from the same pre-trained model and are
fine-tuned each by itself; the new model begins from nothing. With `rounds` above 1 the new model is the next round's
beginning.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxmm.atomic import write_atomically
from jaxmm.capfilt.html_report import write_report
from jaxmm.capfilt.manifest import agree
from jaxmm.capfilt.merge import merge, merged_source
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import SIZE, begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import NUCLEUS
from jaxmm.checkpoints import whole_steps
from jaxmm.config import InitConfig, TrainConfig, to_dict
from jaxmm.hosts.startup import barrier
from jaxmm.inference.generate import Decoding
from jaxmm.training.loop import train
from jaxmm.training.optimizer import learning_rate
from jaxmm.validation import check_types, require

STATE = "bootstrap.json"


@dataclass(frozen=True, kw_only=True)
class CapFiltConfig:
    """A bootstrap. `data.train` of its runs is filled in."""

    pretrain: TrainConfig
    """Of the first model, on the web's and people's texts, and of the new ones, on the merged data."""
    captioner: TrainConfig
    """Fine-tuning for writing, on people's texts."""
    filter: TrainConfig
    """Fine-tuning for comparing and matching, on people's texts."""
    web: str = "scenes:web"
    """Pictures with noisy texts, a source."""
    human: str = "scenes:train"
    """Pictures with texts that people wrote, a source."""
    human_weight: int = 1
    """How often a record of people counts in an epoch."""
    decoding: Decoding = field(default_factory=lambda: NUCLEUS)
    """How captions are written."""
    captions: int = 1
    """Synthetic captions a picture."""
    rule: Rule = field(default_factory=Rule)
    """Which texts stay."""
    rounds: int = 1
    """How often the data is made better."""
    shard_records: int = SIZE
    """Records in a shard, of a source that has none of its own."""
    seed: int = 0
    """Of what captioners draw. The runs have seeds of their own."""

    def __post_init__(self):
        """Checks ranges."""
        check_types(self)
        for name in ("human_weight", "rounds", "shard_records"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.captions >= 0, "captions", self.captions, "0 or more")


def bootstrap(config: CapFiltConfig, out: Path, *, say: Callable[[str], Any] = print) -> dict[str, dict[str, float]]:
    """Runs `config` in `out`, from where it was left; the metrics of every run by its name, {} when asked to stop.

    `out/pretrain` is the first model; `out/round-1` holds `captioner`, `filter`, `data` (a CapFilt folder) and `model`,
    the new one; and so on. Raises `ConfigError` where `out` holds another bootstrap (the number of rounds may change),
    and what training and the stages raise.
    """
    for run in (config.pretrain, config.captioner, config.filter):
        learning_rate(run.optimizer, run.steps)      # what the last run would refuse is refused before the first
    agree(out, free=("rounds",), **to_dict(config))
    state = Runs(out)
    data_dir = config.pretrain.data.data_dir
    both = f"{config.web} + {config.human_weight}*{config.human}"
    if not state.run("pretrain", on(config.pretrain, both), say):
        return {}
    last = out / "pretrain"
    for number in range(1, config.rounds + 1):
        here = f"round-{number}"
        for role in ("captioner", "filter"):
            recipe = on(getattr(config, role), config.human)
            if not state.run(f"{here}/{role}", replace(recipe, init=InitConfig(source=str(last))), say):
                return {}
        folder = begin(out / here / "data", config.web, config.human, size=config.shard_records, data_dir=data_dir)
        write_captions(folder, [str(out / here / "captioner")], decoding=config.decoding, captions=config.captions,
                       seed=config.seed)
        write_scores(folder, str(out / here / "filter"))
        select(folder, config.rule)
        merged = merge(folder)
        if jax.process_index() == 0:
            say(f"report: {write_report(folder)}")
        barrier("report")
        if not state.run(f"{here}/model", on(config.pretrain, merged_source(merged, config.human_weight)), say):
            return {}
        last = out / here / "model"
    return state.metrics


def on(recipe: TrainConfig, source: str) -> TrainConfig:
    """`recipe`, trained on `source`."""
    return replace(recipe, data=replace(recipe.data, train=source))


class Runs:
    """The training runs in a folder: those that are done are not done again."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / STATE
        self.metrics: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str, recipe: TrainConfig, say: Callable[[str], Any]) -> bool:
        """Trains `recipe` in the folder `name`; False where it was asked to stop."""
        if name in self.metrics:
            return True
        say(f"== {name}: {recipe.steps:,} steps on {recipe.data.train}")
        metrics = train(recipe, self.out / name)
        steps = whole_steps(self.out / name / "checkpoints")
        if not steps or steps[-1] < recipe.steps:
            return False
        self.note(name, metrics)
        return True

    def note(self, name: str, metrics: Mapping[str, float]) -> None:
        """Writes down what was measured under `name`."""
        self.metrics[name] = {key: float(value) for key, value in metrics.items()}
        if jax.process_index() == 0:
            write_atomically(self.path, json.dumps(self.metrics, indent=2) + "\n")


def print_metrics(metrics: dict[str, dict[str, float]]) -> None:
    """A table: models side by side, the first one and those that were trained on better data."""
    models = [name for name in metrics if name == "pretrain" or name.endswith("/model")]
    table = Table("metric", *models)
    for key in metrics[models[-1]]:
        table.add_row(key, *(f"{metrics[name].get(key, float('nan')):.4f}" for name in models))
    Console(highlight=False).print(table)
