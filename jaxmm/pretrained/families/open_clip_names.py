"""The architectures of open_clip by name, for files of weights that come without a configuration.

Neither the activation nor the number of heads is in the weights, so such a file needs a name, or a JSON file with a
configuration. `open_clip_models.json` holds open_clip's public configurations of its own vision transformers.
"""

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from jaxmm.paths import local_copy, user_path
from jaxmm.pretrained import layers
from jaxmm.pretrained.family import known
from jaxmm.pretrained.io.files import FileError, Tensors

Config = Mapping[str, Any]
OPENAI = ("input_resolution", "context_length", "vocab_size")
"""Constants in OpenAI's own files, all of which have the quick GELU and heads of 64."""


@cache
def models() -> dict[str, Config]:
    """Return open_clip's configurations by name."""
    return json.loads(resources.files(__package__).joinpath("open_clip_models.json").read_text(encoding="utf-8"))


def named_config(architecture: str, tensors: Tensors) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration of the name or JSON file `architecture`, with the sizes of the weights, and notes.

    Image size, context length, vocabulary and depth may differ from the named ones. Raises `FileError` for an unknown
    name, and if patch or widths differ: then it is another model, with other heads.
    """
    if architecture.endswith(".json"):
        path = local_copy(user_path(architecture, "architecture"))
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            config = config.get("model_cfg", config)
            widths(config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"architecture is {architecture!r}, which is no configuration of open_clip: "
                            f"{type(error).__name__}: {error}") from None
    else:
        config = known(models(), architecture, "architecture")
    sizes = read_sizes(tensors)
    if widths(config) != widths(sizes):
        described = "image tower {}, patch {}, text tower {}".format
        raise FileError(f"architecture is {architecture!r} ({described(*widths(config))}); the widths of the weights "
                        f"are {described(*widths(sizes))}, as of {fitting(tensors)}")
    notes = [f"{tower} has {sizes[part]['layers']} layers; {architecture} has {config[part]['layers']}"
             for part, tower in (("vision_cfg", "the image tower"), ("text_cfg", "the text tower"))
             if sizes[part]["layers"] != config[part]["layers"]]
    vision, side = config["vision_cfg"], sizes["vision_cfg"]["image_size"]
    if vision.get("image_size", 224) // vision["patch_size"] * vision["patch_size"] == side:
        side = vision.get("image_size", 224)  # a remainder below a patch is not read
    merged = {part: {**config[part], **sizes[part]} for part in ("vision_cfg", "text_cfg")}
    merged["vision_cfg"]["image_size"] = side
    return {**config, **merged, "embed_dim": sizes["embed_dim"]}, tuple(notes)


def read_sizes(tensors: Tensors) -> dict[str, Any]:
    """Return the sizes in the weights, in the form of a configuration. Raises `FileError` if they lack a tower."""
    text = "text." if "text.token_embedding.weight" in tensors else ""
    parts = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", f"{text}token_embedding.weight",
             f"{text}positional_embedding")
    if missing := [name for name in parts if name not in tensors]:
        raise FileError(f"the weights have no {', '.join(missing)}; expected both towers of a CLIP")
    conv, positions, projection, tokens, length = (tensors[name].shape for name in parts)
    return {"embed_dim": projection[1],
            "vision_cfg": {"width": conv[0], "patch_size": conv[-1], "image_size": math.isqrt(positions[0]) * conv[-1],
                           "layers": layers.depth(tensors, "visual.transformer.resblocks.")},
            "text_cfg": {"width": tokens[1], "vocab_size": tokens[0], "context_length": length[0],
                         "layers": layers.depth(tensors, f"{text}transformer.resblocks.")}}


def widths(config: Config) -> tuple[int, int, int]:
    """Return the width and the patch of the image tower, and the width of the text tower."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return vision["width"], vision["patch_size"], text.get("width", 512)


def fitting(tensors: Tensors) -> str:
    """Return the names of the architectures that have the widths of the weights, for messages."""
    names = [name for name, config in models().items() if widths(config) == widths(read_sizes(tensors))]
    return ", ".join(names) or "no architecture of open_clip; name a JSON file with its configuration"


def is_openai(tensors: Tensors) -> bool:
    """Return whether the weights are in a file of OpenAI's."""
    return all(name in tensors for name in OPENAI)
