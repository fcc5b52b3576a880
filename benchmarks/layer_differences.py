"""Full-size models at random weights, written by transformers: the largest difference of each layer, fp32.

    python -m benchmarks.layer_differences [--only NAME] [--json FILE]

The comparison of `jaxmm parity SOURCE`, for CLIP ViT-L/14, SigLIP B/16, ViT-L/16 at 384 and BLIP's classes for
captioning, matching and question answering. "ids" compares 20 generated tokens: 0 means that they are the same.
"""

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine
from jaxmm.inference.parity import compare

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BLIP = {"BLIP base at 384, captions": (BASE, 384, "BlipForConditionalGeneration"),
        "BLIP base at 384, matching": (BASE, 384, "BlipForImageTextRetrieval"),
        "BLIP base at 480, questions": (BASE, 480, "BlipForQuestionAnswering"),
        "BLIP large at 384, captions": (LARGE, 384, "BlipForConditionalGeneration")}
MODELS = ("CLIP ViT-L/14", "SigLIP B/16", "ViT-L/16 at 384", *BLIP)


def write(name: str, folder: Path) -> None:
    """Write random weights, drawn by transformers."""
    import torch
    import transformers
    torch.manual_seed(0)
    if name == "CLIP ViT-L/14":
        text = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "projection_dim": 768}
        config = transformers.CLIPConfig(text_config=text, projection_dim=768,
                                         vision_config=LARGE | {"patch_size": 14, "projection_dim": 768})
        transformers.CLIPModel(config).save_pretrained(folder)
    elif name == "SigLIP B/16":
        transformers.SiglipModel(transformers.SiglipConfig()).save_pretrained(folder)
    elif name in BLIP:      # the class's defaults: 8 heads, epsilon 1e-5, weights too small to depend on the image
        vision, size, kind = BLIP[name]
        vision = vision | {"image_size": size, "layer_norm_eps": 1e-6, "initializer_range": 0.02}
        text = BASE | {"encoder_hidden_size": vision["hidden_size"], "initializer_range": 0.02}
        config = transformers.BlipConfig(text_config=text, vision_config=vision, initializer_range=0.02)
        getattr(transformers, kind)(config).save_pretrained(folder)
    else:
        config = transformers.ViTConfig(**LARGE, image_size=384, patch_size=16, num_labels=1000)
        transformers.ViTForImageClassification(config).save_pretrained(folder)


def main():
    """Compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = []
    for name in MODELS:
        if args.only.lower() not in name.lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(name, Path(folder) / "model")
            differences, _, library = compare(Path(folder) / "model")
        rows.append({"model": name, "library": library, "machine": machine(),
                     "differences": {row.name: row.largest for row in differences},
                     "values": {row.name: row.scale for row in differences}})
        table = Table("at", "largest difference", "largest value", title=f"{name}, against {library}")
        for row in differences:
            table.add_row(row.name, f"{row.largest:.1e}", f"{row.scale:.3g}")
        Console().print(table)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
