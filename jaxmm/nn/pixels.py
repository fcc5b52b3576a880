"""Mean and std normalisation of images: from bytes to the numbers a model was trained on."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Mean and standard deviation of each channel, on the scale 0 to 1."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, image: Num[Array | np.ndarray, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
        """Return (x / 255 - mean) / std of images in 0 to 255, on the device, in fp32."""
        scale = 1 / (255 * jnp.asarray(self.std, jnp.float32))
        shift = jnp.asarray(self.mean, jnp.float32) / jnp.asarray(self.std, jnp.float32)
        return jnp.asarray(image).astype(jnp.float32) * jnp.broadcast_to(scale, image.shape) - jnp.broadcast_to(
            shift, image.shape)


INCEPTION = Pixels()
IMAGENET = Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP_PIXELS = Pixels(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
