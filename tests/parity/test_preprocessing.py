"""Pictures as transformers' own processors prepare them, from the `preprocessor_config.json` that they wrote."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

from jaxmm.pretrained.families.transformers import read_preprocessor
from tests.pretrained import tiny

pytestmark = pytest.mark.parity
PROCESSORS = {"clip": "CLIPImageProcessorPil", "siglip": "SiglipImageProcessorPil", "vit": "ViTImageProcessorPil",
              "deit": "DeiTImageProcessorPil"}


def photographs():
    """Two photographs from a package that is installed, whole and in parts of many shapes, grey and small."""
    images = []
    for array in load_sample_images().images:
        image = Image.fromarray(array)
        images += [image, image.rotate(90, expand=True), image.crop((10, 20, 310, 120)), image.crop((0, 0, 101, 333)),
                  image.resize((60, 41)), image.crop((5, 5, 229, 229)), image.crop((0, 0, 257, 256)),
                  image.convert("L").convert("RGB")]
        data = io.BytesIO()
        image.save(data, "JPEG", quality=60)
        images.append(Image.open(io.BytesIO(data.getvalue())).convert("RGB"))
    return images


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("size", [224, 96])
def test_processors(family, size, record_property):
    crop = {"crop_size": {"height": size, "width": size}} if family in ("clip", "deit") else {}
    side = {"clip": {"shortest_edge": size}, "deit": {"height": size * 8 // 7, "width": size * 8 // 7}}.get(
        family, {"height": size, "width": size})
    theirs = getattr(transformers, PROCESSORS[family])(size=side, **crop)
    vision = tiny.VIT.model.__class__(transformer=tiny.STACK, image_size=size, patch=4)
    image, pixels, notes = read_preprocessor(theirs.to_dict(), vision, tiny.VIT.pixels, {"size": size, "resample": 3})
    assert not notes
    ours = tiny.Model(task=tiny.VIT.__class__(model=vision, pixels=pixels), params={}, preprocessing=image)
    images = photographs()
    want = np.stack([np.asarray(x) for x in theirs(images, return_tensors="np")["pixel_values"]])
    got = np.asarray(pixels(jnp.asarray(ours.preprocess(images)))).transpose(0, 3, 1, 2)
    std = np.asarray(pixels.std)[:, None, None]
    difference = float(np.abs((got - want) * std).max() * 255)
    record_property(f"{type(theirs).__name__} at {size}, largest difference of 255", f"{difference:.3f}")
    assert difference <= 1.0 + 1e-3
