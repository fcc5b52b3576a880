"""`preprocessor_config.json`: how transformers resizes, crops and normalises images; read and written."""

from collections.abc import Mapping
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import Pixels
from jaxmm.pretrained.family import known, unsupported
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.io.hub import Files

PREPROCESSOR = "preprocessor_config.json"
RESAMPLE = {2: "bilinear", 3: "bicubic"}
RESAMPLE_NAMES = {"bilinear": 2, "bicubic": 3}


def read_preprocessor(
    config: Mapping[str, Any] | None, model: ViTConfig, pixels: Pixels, default: Mapping[str, Any]
) -> tuple[ImageConfig, Pixels, tuple[str, ...]]:
    """Read `preprocessor_config.json`; without one, take the family's `default` and say so in a note."""
    size, patch = model.image_size, model.patch
    if config is None:
        resize, crop, shortest = default["size"], default.get("crop"), default.get("shortest", False)
        resample, notes = default["resample"], ("there is no preprocessor_config.json: images are prepared as for this "
                                                "family's released models",)
    else:
        resize, shortest = _processor_size(config, default)
        crop = config.get("crop_size", default.get("crop")) if config.get("do_center_crop", "crop" in default) else None
        crop = None if crop is None else square(crop, PREPROCESSOR, "crop_size")
        unsupported(config, {"do_resize": True, "do_rescale": True, "do_normalize": True}, PREPROCESSOR)
        resample, notes = config.get("resample", default["resample"]), ()
        resample = default["resample"] if resample is None else resample
        pixels = Pixels(mean=_channels(config, "image_mean", pixels.mean),
                        std=_channels(config, "image_std", pixels.std))
    final = crop or resize
    if not size <= final < size + patch:  # a remainder below a patch is not read
        raise FileError(f"images are prepared at {final} x {final}; the model reads {size} x {size}")
    image = ImageConfig(size=final, eval_crop="center_floor" if shortest else "squash", eval_resize=resize / final,
                        interpolation=known(RESAMPLE, RESAMPLE_NAMES.get(resample, resample), "resample"))
    return image, pixels, notes


def _processor_size(config: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the side that images are resized to, and whether it is the shorter one's. Raises `FileError`."""
    stated = config.get("size")
    stated = default["size"] if stated is None else stated
    if isinstance(stated, Mapping) and "shortest_edge" in stated:
        return stated["shortest_edge"], True
    return square(stated, PREPROCESSOR, "size"), isinstance(stated, int) and default.get("shortest", False)


def square(size: Any, file: str, name: str) -> int:
    """Return the side of a square: a number, [height, width], or both by name. Raises `FileError` for others."""
    sides = ((size.get("height"), size.get("width")) if isinstance(size, Mapping) else
             tuple(size) if isinstance(size, (list, tuple)) else (size, size))
    if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int:
        size = dict(size) if isinstance(size, Mapping) else size
        raise FileError(f"{file}: {name} is {size}; supported are squares" + (
            " and shortest_edge" if name == "size" else ""))
    return sides[0]


def _channels(config: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Return three values, or one for all channels; null: the `default`. Raises `FileError` for others."""
    value = config.get(name)
    values = default if value is None else (value,) * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(
            isinstance(part, (int, float)) for part in values):
        raise FileError(f"{PREPROCESSOR}: {name} is {value!r}; expected three numbers")
    return tuple(values)


def write_preprocessor(image: ImageConfig, pixels: Pixels, model_type: str) -> dict[str, Any]:
    """Return `preprocessor_config.json` for the image processor of `model_type`."""
    names = {"vit": "ViT", "deit": "DeiT", "clip": "CLIP", "siglip": "Siglip", "blip": "Blip"}
    processor = f"{names[model_type]}ImageProcessor"
    resize, square = round(image.size * image.eval_resize), {"height": image.size, "width": image.size}
    size = {"shortest_edge": resize} if image.eval_crop != "squash" else {"height": resize, "width": resize}
    crop = image.eval_crop != "squash" or resize != image.size
    return {"image_processor_type": processor, "do_resize": True, "size": size, "do_center_crop": crop,
            "resample": {name: number for number, name in RESAMPLE.items()}[image.interpolation],
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(pixels.mean),
            "image_std": list(pixels.std)} | ({"crop_size": square} if crop else {})


def preprocessor(files: Files) -> dict[str, Any] | None:
    """Return the configuration of the image processor; transformers 5 reads the processor's file first."""
    processor = files.json("processor_config.json") or {}
    return processor.get("image_processor") or files.json(PREPROCESSOR)
