r"""CLIP from scratch on your own images and captions: JSON lines with `image` (a path) and `caption`.

    python run_train.py --config configs/clip_captions.py \
        --data.train captions:train.jsonl --data.val captions:test.jsonl

For a few thousand small images; the tokenizer is trained on the captions. Held-out recall ranks all test pairs and
depends on the data. On 1,470 emoji and their names, recall@1/5/10 on 163 held-out pairs is 0.23/0.41/0.50 (image to
text) and 0.18/0.41/0.48 (text to image). Chance is 0.006/0.031/0.061; a ridge regression from words to pixels (`python
-m benchmarks.caption_baseline`) reaches 0.27/0.38/0.45 and 0.24/0.36/0.45.
"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Retrieval
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.contrastive_learning import ContrastiveLearning


def get_config() -> TrainConfig:
    """Return the recipe."""
    vision = ViTConfig(
        transformer=TransformerConfig(width=128, depth=4, heads=4, mlp_dim=384, drop_path=0.1),
        image_size=64, patch=8, pool="gap", class_token=False)
    text = TextConfig(
        transformer=TransformerConfig(width=128, depth=2, heads=4, mlp_dim=384, dropout=0.1),
        vocab_size=None, context_length=24, causal=False, pool="mean", pad_id=0)
    return TrainConfig(
        task=ContrastiveLearning(model=CLIPConfig(vision=vision, text=text, embed_dim=128)),
        steps=1500,
        data=DataConfig(
            train="captions:data/train.jsonl", val="captions:data/test.jsonl", batch_size=128,
            image=ImageConfig(size=64, train_crop="random", scale=(0.6, 1.0), flip=False, eval_crop="squash"),
            tokenizer=TokenizerConfig(kind="train-wordpiece", vocab_size=1500, context_length=24)),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup=1 / 15, b2=0.98, average=0.99),
        evals=(Retrieval(weights="average"),),
        eval_every=500, log_every=25)
