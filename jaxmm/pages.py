"""Write self-contained HTML pages from templates."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmm.atomic import write_atomically
from jaxmm.optional import require_extra

_MAX_TEXT = 180


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write one self-contained HTML file from a template in this folder; return its path."""
    require_extra("train", "an HTML page")
    write_atomically(path, render_page(template, **values))
    return path


def render_page(template: str, **values: Any) -> str:
    """Return the HTML of a template in this folder."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("jaxmm", "."), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"number": number, "data_uri": data_uri, "cut": _cut, "overlay": overlay}
    return environment.get_template(template).render(**values)


def number(value: float | int, digits: int = 4) -> str:
    """Format a value for people: a few digits, thousands separators, a dash for NaN."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    if abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.{digits}g}"


def data_uri(pixels: np.ndarray) -> str:
    """Return a uint8 [h, w, 3] image as a data URI."""
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(out, "WEBP", lossless=max(image.size) <= 64, quality=85)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def overlay(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Brighten a uint8 [h, w, 3] image where the attention `weights` [g, g] are high, darken it where they are low."""
    height, width = pixels.shape[:2]
    light = weights - weights.min()
    light = Image.fromarray((255 * light / max(float(light.max()), 1e-12)).astype(np.uint8))
    light = np.asarray(light.resize((width, height), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    return (pixels * (0.2 + 0.8 * light)).astype(np.uint8)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT - 1] + "…"
