"""Grade generated images of scenes: the colour and the shape of an object, by comparison with drawn candidates."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, UInt8

from jaxmm.data.scenes.drawing import COLORS, SHAPES, Object, Scene, draw

LEAST = 0.3
"""Least share of an object's pixels that is in the graded part, and that is outside of it."""


def nearest_look(
    scene: Scene, graded: Object, images: UInt8[np.ndarray, "n s s 3"], part: Bool[np.ndarray, "s s"]
) -> list[tuple[str, str]] | None:
    """Return colour and shape of the object `graded` in each image of `scene`, judged by the pixels in `part`.

    It is drawn in all colours and shapes at its place. The nearest drawing (sum of squared differences, over the pixels
    of `part` that any of its shapes covers) tells the look. None: less than `LEAST` of the object is in `part`, or
    outside of it, so that nothing was to be continued.
    """
    side = images.shape[1]

    def drawn(**look: str) -> np.ndarray:
        objects = (replace(graded, **look) if o == graded else o for o in scene.objects)
        return np.asarray(draw(replace(scene, objects=tuple(objects)), side), np.float32)

    empty = np.asarray(draw(replace(scene, objects=tuple(o for o in scene.objects if o != graded)), side), np.float32)
    object_pixels = np.abs(drawn() - empty).sum(axis=-1) > 0
    share = (object_pixels & part).sum() / max(object_pixels.sum(), 1)
    if not LEAST <= share <= 1 - LEAST:
        return None
    if not len(images):
        return []
    looks = [(color, shape) for color in COLORS for shape in SHAPES]
    candidates = np.stack([drawn(color=color, shape=shape) for color, shape in looks])
    place = (np.abs(candidates - empty).sum(axis=-1) > 0).any(axis=0) & part
    distances = np.square(images[:, None, place].astype(np.float32) - candidates[None, :, place]).sum(axis=(2, 3))
    return [looks[i] for i in distances.argmin(axis=1)]
