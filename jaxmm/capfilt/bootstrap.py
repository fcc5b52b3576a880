"""Run the whole procedure: pre-train, fine-tune a captioner and a filter, improve the data, pre-train again on it.

Li et al. 2022, section 3.3 and figure 3: captioner and filter start from the same pre-trained model and are fine-tuned
separately; the new model starts from scratch. With `rounds` above 1 the next round starts from the new model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
from rich.console import Console
from rich.table import Table

from jaxmm.atomic import write_atomically
from jaxmm.capfilt.html_report import write_report
from jaxmm.capfilt.manifest import plain, record_facts
from jaxmm.capfilt.merge import merge, merged_source
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import SHARD_RECORDS, begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import NUCLEUS, CaptionOptions
from jaxmm.checkpoints import whole_steps
from jaxmm.config import InitConfig, TrainConfig
from jaxmm.hosts.startup import barrier
from jaxmm.inference.generate import Decoding
from jaxmm.training.loop import train
from jaxmm.training.optimizer import learning_rate
from jaxmm.validation import POSITIVE, check_types

STATE = "bootstrap.json"


@dataclass(frozen=True, kw_only=True)
class CapFiltConfig:
    """A bootstrap: three training recipes, whose `data.train` is filled in, and the options of the stages."""

    pretrain: TrainConfig
    """Pre-training of the first model, on web texts and human captions, and of the new ones, on the merged data."""
    captioner: TrainConfig
    """Fine-tuning of the captioner, on human captions."""
    filter: TrainConfig
    """Fine-tuning of the filter, on human captions."""
    web: str = "scenes:web"
    """Source of images with noisy texts."""
    human: str = "scenes:train"
    """Source of images with human captions."""
    human_weight: Annotated[int, POSITIVE] = 1
    """Times that each human record counts per epoch."""
    decoding: Decoding = field(default_factory=lambda: NUCLEUS)
    """Search or sampling of the captions' tokens."""
    captions: int = 1
    """Synthetic captions per image."""
    rule: Rule = field(default_factory=Rule)
    """Rule of which texts stay."""
    rounds: Annotated[int, POSITIVE] = 1
    """Number of times that the data is improved."""
    shard_records: Annotated[int, POSITIVE] = SHARD_RECORDS
    """Records per shard, if the source has no shards of its own."""
    seed: int = 0
    """Seed of the captions. The training runs have seeds of their own."""

    def __post_init__(self):
        check_types(self)
        self.caption_options  # noqa: B018  (checks its ranges)

    @property
    def caption_options(self) -> CaptionOptions:
        """Options of the synthetic captions."""
        return CaptionOptions(captions=self.captions, decoding=self.decoding, seed=self.seed)


def bootstrap(config: CapFiltConfig, out: Path, *, say: Callable[[str], Any] = print) -> dict[str, dict[str, float]]:
    """Run `config` in `out`, or continue it, and return the metrics of every run by its name; {} if asked to stop.

    `out/pretrain` is the first model; `out/round-1` has `captioner`, `filter`, `data` (a CapFilt folder) and `model`,
    the new one; and so on. Raise `ConfigError` if `out` has another bootstrap (the number of rounds may change), and
    whatever training and the stages raise.
    """
    for run in (config.pretrain, config.captioner, config.filter):
        learning_rate(run.optimizer, run.steps)      # a recipe that cannot run is refused before the first one runs
    record_facts(out, free=("rounds",), **plain(config))
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
        write_captions(folder, [str(out / here / "captioner")], config.caption_options)
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
    """Return `recipe` with `source` to train on."""
    return replace(recipe, data=replace(recipe.data, train=source))


class Runs:
    """The training runs in a folder; finished ones are not repeated."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / STATE
        self.metrics: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str, recipe: TrainConfig, say: Callable[[str], Any]) -> bool:
        """Train `recipe` in the folder `name`. Return False if it was asked to stop."""
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
        """Record the metrics of the run `name`."""
        self.metrics[name] = {key: float(value) for key, value in metrics.items()}
        if jax.process_index() == 0:
            write_atomically(self.path, json.dumps(self.metrics, indent=2) + "\n")


def print_metrics(metrics: dict[str, dict[str, float]]) -> None:
    """Print a table of the first model beside those that were trained on improved data."""
    models = [name for name in metrics if name == "pretrain" or name.endswith("/model")]
    table = Table("metric", *models)
    for key in metrics[models[-1]]:
        table.add_row(key, *(f"{metrics[name].get(key, float('nan')):.4f}" for name in models))
    Console(highlight=False).print(table)
