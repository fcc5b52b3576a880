"""Build the TFDS data set `scenes` as ArrayRecord, without TensorFlow."""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds

from jaxmm.data.scenes import language
from jaxmm.data.scenes.drawing import Scene, png, random_scene

_SEED = 20240


@dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """The number of images in each split, and their side in pixels."""

    val: int = 500
    test: int = 500
    train: int = 8000
    web: int = 4000
    size: int = 64


def make_scenes(config: ScenesConfig) -> dict[str, list[Scene]]:
    """Return the scenes of each split. No two of them, also of different splits, have the same description."""
    descriptions: set[str] = set()
    splits: dict[str, list[Scene]] = {}
    for split in ("val", "test", "train", "web"):      # evaluation splits first: they do not depend on the others
        rng = random.Random(f"scenes {_SEED} {split}")
        scenes = splits[split] = []
        while len(scenes) < getattr(config, split):
            scene = random_scene(rng)
            description = language.describe(scene)
            if description not in descriptions:
                descriptions.add(description)
                scenes.append(scene)
    return splits


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Pictures of one to three coloured shapes with captions, questions, answers and objects.

    The split `web` has noisy captions, with the truth beside them.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012 - the form that TFDS wants
    BUILDER_CONFIGS = [  # noqa: RUF012
        ScenesConfig(name="default", description="13,000 pictures."),
        ScenesConfig(name="tiny", description="For tests.", val=40, test=20, train=160, web=80, size=32),
    ]

    url_infos = {}  # noqa: RUF012 - nothing is downloaded; TFDS would look for checksum files in the package

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            disable_shuffling=True,      # it is in random order
            features=tfds.features.FeaturesDict({
                "key": text,
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "texts": texts,
                "true_texts": texts,
                "noise": text,
                "clean": np.bool_,
                "questions": tfds.features.Sequence({"kind": text, "question": text, "answer": text}),
                "objects": tfds.features.Sequence({
                    "shape": text, "color": text, "size": text,
                    "x": np.float32, "y": np.float32, "radius": np.float32}),
            }))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        splits = make_scenes(self.builder_config)
        return {split: self._generate_examples(split, scenes) for split, scenes in splits.items()}

    def _generate_examples(self, split: str, scenes: list[Scene]) -> Iterator[tuple[int, dict]]:
        rng = random.Random(f"words {_SEED} {split}")
        for i, scene in enumerate(scenes):
            true = texts = language.captions(scene, rng)
            noise = "correct"
            asked = language.questions(scene, rng)
            if split == "web":
                caption, noise = language.web_caption(scene, scenes, rng)
                texts = (caption,)
            yield i, {
                "key": f"{split}-{i:05d}",
                "image": png(scene, self.builder_config.size),
                "texts": texts,
                "true_texts": true,
                "noise": noise,
                "clean": noise == "correct",
                "questions": [vars(q) for q in asked],
                "objects": [vars(o) for o in scene.objects],
            }

    def _log_download_bytes(self) -> None:
        # replaces two paragraphs about downloads
        config = self.builder_config
        count = config.train + config.val + config.test + config.web
        print(f"Drawing the data set scenes ({count:,} images) into {self.data_dir}", file=sys.stderr)

    def _log_download_done(self) -> None:
        pass
