r"""A classifier of your own images, one folder per class, from a trained image tower.

    python run_train.py --config configs/finetune_folder.py --init.from openai/clip-vit-base-patch32 \
        --data.train folder:DIR/train --data.val folder:DIR/test

`--init.from` takes what `jaxmm.load` takes: a ViT, CLIP or SigLIP from the Hugging Face hub, a folder, a file, or the
workdir of another run. Its architecture, mean and std are used; the head is new and starts at zero. Another
`--data.image.size` (a multiple of the patch) resizes the position table.
"""

from jaxmm.config import DataConfig, ImageConfig, InitConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import TopKAccuracy
from jaxmm.models.vit import vit
from jaxmm.tasks.image_classification import Classification


def get_config() -> TrainConfig:
    """Return the recipe."""
    return TrainConfig(
        task=Classification(model=vit("B/32", stack={"drop_path": 0.1, "remat": "cheap"}), label_smoothing=0.1),
        init=InitConfig(source="openai/clip-vit-base-patch32"),
        steps=1000,
        data=DataConfig(train="folder:data/train", val="folder:data/test", batch_size=64,
                        image=ImageConfig(size=224, scale=(0.4, 1.0))),
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.05, warmup=0.1, layer_decay=0.75,
                                  multipliers=(("^head/", 10.0),)),
        evals=(TopKAccuracy(),),
        eval_every=250, log_every=20)
