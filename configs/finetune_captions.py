r"""CLIP on your own images and captions, from a trained CLIP or SigLIP.

    python run_train.py --config configs/finetune_captions.py --init.from openai/clip-vit-base-patch32 \
        --data.train captions:train.jsonl --data.val captions:test.jsonl

`--init.from` takes what `jaxmm.load` takes: a Hugging Face name, a folder, a file, or the workdir of another run. Its
towers, mean and std, and vocabulary are used. For SigLIP add `--task.kind sigmoid --task.model.logit-bias -10`.
"""

from jaxmm.config import DataConfig, ImageConfig, InitConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import Retrieval
from jaxmm.models.clip import clip
from jaxmm.tasks.contrastive_learning import ContrastiveLearning


def get_config() -> TrainConfig:
    """Return the recipe."""
    return TrainConfig(
        task=ContrastiveLearning(model=clip("ViT-B-32", stack={"remat": "cheap"})),
        init=InitConfig(source="openai/clip-vit-base-patch32"),
        steps=1000,
        data=DataConfig(train="captions:data/train.jsonl", val="captions:data/test.jsonl", batch_size=128,
                        image=ImageConfig(size=224, scale=(0.8, 1.0), flip=False)),
        optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.1, warmup=0.1, b2=0.98),
        evals=(Retrieval(),),
        eval_every=250, log_every=20)
