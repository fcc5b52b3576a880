"""Published scores of published checkpoints, to print beside ours, and where they come from."""

import re
from typing import NamedTuple

OPEN_CLIP = "open_clip, docs/openclip_classification_results.csv"
OPEN_CLIP_RETRIEVAL = "open_clip, docs/openclip_retrieval_results.csv"
TIMM = "timm, results/results-imagenet.csv"
BLIP = "BLIP (arXiv:2201.12086)"


class Score(NamedTuple):
    """A published value of a metric, as a fraction of 1."""

    value: float
    source: str


_CLASSIFICATION = ("imagenet1k", "imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "cifar10", "cifar100",
                   "food101", "sun397", "stl10")
_RETRIEVAL = ("i2t_recall@1", "i2t_recall@5", "i2t_recall@10", "t2i_recall@1", "t2i_recall@5", "t2i_recall@10")
_ZERO_SHOT = {
    "clip-vit-base-patch32": (.6332, .5592, .3155, .6933, .4229, .8983, .6423, .8400, .6248, .9713),
    "clip-vit-base-patch16": (.6834, .6188, .4995, .7770, .4824, .9077, .6695, .8872, .6435, .9825),
    "clip-vit-large-patch14": (.7554, .6983, .7075, .8784, .5959, .9559, .7582, .9305, .6756, .9936),
    "clip-vit-large-patch14-336": (.7656, .7089, .7748, .8905, .6100, .9493, .7436, .9386, .6865, .9943),
    "clip-vit-b-32-laion2b-s34b-b79k": (.6656, .5814, .2627, .7643, .5366, .9358, .7555, .8269, .6872, .9656),
    "clip-vit-b-16-laion2b-s34b-b88k": (.7023, .6228, .3823, .8061, .5608, .9494, .7684, .8663, .7085, .9786),
    "clip-vit-l-14-laion2b-s32b-b82k": (.7525, .6780, .5385, .8742, .6328, .9662, .8332, .9100, .7434, .9885),
    "clip-vit-h-14-laion2b-s32b-b79k": (.7796, .7090, .5935, .8934, .6657, .9745, .8473, .9273, .7521, .9848),
    "siglip-base-patch16-224": (.7604, .6893, .4541, .9030, .6792, .9234, .7223, .9162, .7001, .9821),
    "siglip-base-patch16-256": (.7653, .6920, .4877, .9076, .6810, .9334, .7327, .9200, .7026, .9818),
    "siglip-base-patch16-384": (.7849, .7211, .6233, .9214, .6955, .9276, .7147, .9362, .7096, .9863),
    "siglip-large-patch16-256": (.8045, .7376, .6213, .9396, .7209, .9619, .8191, .9463, .7253, .9911),
    "siglip-so400m-patch14-384": (.8308, .7717, .8247, .9575, .7454, .9672, .8357, .9635, .7541, .9930),
}
"""Top-1 on `_CLASSIFICATION`, by the end of the repository's name on the hub."""
_FLICKR_COCO = {
    "clip-vit-base-patch32": ((.7890, .9490, .9820, .5878, .8356, .9002), (.5012, .7500, .8352, .3044, .5594, .6687)),
    "clip-vit-base-patch16": ((.8220, .9660, .9900, .6216, .8572, .9192), (.5242, .7670, .8462, .3309, .5842, .6899)),
    "clip-vit-large-patch14": ((.8520, .9740, .9920, .6496, .8724, .9204), (.5634, .7938, .8660, .3651, .6106, .7113)),
    "clip-vit-large-patch14-336": ((.8770, .9850, .9940, .6690, .8900, .9334),
                                   (.5794, .8120, .8792, .3709, .6162, .7147)),
    "clip-vit-b-32-laion2b-s34b-b79k": ((.8410, .9620, .9830, .6678, .8838, .9310),
                                        (.5632, .7984, .8712, .3934, .6543, .7561)),
    "clip-vit-b-16-laion2b-s34b-b88k": ((.8630, .9790, .9940, .6984, .9038, .9456),
                                        (.5944, .8178, .8862, .4231, .6770, .7706)),
    "clip-vit-l-14-laion2b-s32b-b82k": ((.8950, .9870, .9940, .7552, .9286, .9594),
                                        (.6336, .8398, .9074, .4651, .7108, .7980)),
    "clip-vit-h-14-laion2b-s32b-b79k": ((.9070, .9920, .9970, .7764, .9418, .9660),
                                        (.6592, .8606, .9188, .4948, .7338, .8151)),
    "siglip-base-patch16-224": ((.8910, .9800, .9930, .7468, .9230, .9562), (.6574, .8542, .9126, .4778, .7244, .8100)),
    "siglip-base-patch16-256": ((.9040, .9830, .9930, .7504, .9242, .9626), (.6614, .8634, .9182, .4834, .7254, .8099)),
    "siglip-base-patch16-384": ((.9270, .9910, .9980, .7848, .9416, .9708), (.6774, .8758, .9258, .4990, .7366, .8204)),
    "siglip-large-patch16-256": ((.9180, .9900, .9980, .7904, .9446, .9684),
                                 (.7080, .8870, .9374, .5228, .7580, .8334)),
    "siglip-so400m-patch14-384": ((.9430, .9970, .9980, .8296, .9610, .9804),
                                  (.7242, .8998, .9448, .5421, .7678, .8424)),
}
"""Flickr30K and COCO: image to text and text to image at 1, 5 and 10."""

SCORES: dict[tuple[str, str, str], Score] = {
    **{(model, data, "zero_shot_top1"): Score(value, OPEN_CLIP) for model, values in _ZERO_SHOT.items()
       for data, value in zip(_CLASSIFICATION, values, strict=True)},
    **{(model, data, metric): Score(value, OPEN_CLIP_RETRIEVAL) for model, both in _FLICKR_COCO.items()
       for data, values in zip(("flickr30k", "mscoco_captions"), both, strict=True)
       for metric, value in zip(_RETRIEVAL, values, strict=True)},
    **{(model, "imagenet1k", metric): Score(value, TIMM) for model, values in {
        "vit_base_patch16_384.augreg_in21k_ft_in1k": (.85996, .98002),
        "vit_large_patch16_224.augreg_in21k_ft_in1k": (.85834, .97818),
        "vit_large_patch16_384.augreg_in21k_ft_in1k": (.87084, .98302)}.items()
       for metric, value in zip(("top1", "top5"), values, strict=True)},
    **{(model, data, metric.replace("_", "_itm_")): Score(value, BLIP) for (model, data), values in {
        ("blip-itm-base-coco", "mscoco_captions"): (.819, .954, .978, .643, .857, .915),
        ("blip-itm-large-coco", "mscoco_captions"): (.824, .954, .979, .651, .863, .918),
        ("blip-itm-base-coco", "flickr30k"): (.960, .999, 1.0, .850, .968, .986),
        ("blip-itm-large-coco", "flickr30k"): (.967, 1.0, 1.0, .867, .973, .987)}.items()
       for metric, value in zip(_RETRIEVAL, values, strict=True)},
    ("blip-image-captioning-base", "mscoco_captions", "bleu@4"): Score(.397, BLIP),
    ("blip-image-captioning-base", "mscoco_captions", "cider"): Score(1.333, BLIP),
    ("blip-image-captioning-large", "mscoco_captions", "bleu@4"): Score(.404, BLIP),
    ("blip-image-captioning-large", "mscoco_captions", "cider"): Score(1.367, BLIP),
}
"""Scores by the end of the model's name, the data set's name in CLIP_benchmark, and our name of the metric."""


def published_score(model: str, source: str, metric: str) -> Score | None:
    """Return the published score of a model of the hub on the data set that the spec `source` names, if it is known."""
    return SCORES.get((model.rstrip("/").rpartition("/")[2].lower(), data_set_name(source), metric))


def data_set_name(source: str) -> str:
    """Return the name of the data set in a spec, as CLIP_benchmark writes it: `wds:DIR/wds_vtab-pets:test` is pets."""
    kind, _, location = source.partition(":")
    if kind == "tfds":
        location = location.split(":")[0].split("/")[0]
    name = re.sub(r"/tree/[\w.-]+", "", re.sub(r":\w+$", "", location)).rstrip("/").rpartition("/")[2].lower()
    return name.removeprefix("wds_").removeprefix("vtab-")
