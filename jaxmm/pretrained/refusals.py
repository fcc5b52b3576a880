"""Recognise weights that are no model by themselves: adapters, quantised weights, one tower of two."""

import re

from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.io.hub import Files

ADAPTER = "adapter_config.json"
ADAPTED = re.compile(r"(^|\.)(lora_[AB]|lora_(up|down)|lora_embedding_[AB]|lora_magnitude_vector|hada_w\d_\w|ia3_l)"
                     r"(\.|$)|^base_model\.model\.")
"""Names of tensors of PEFT's adapters."""
QUANTISED = re.compile(r"\.(SCB|qweight|qzeros|g_idx|absmax|quant_map|weight_format|weight_packed|"
                       r"weight_scale(_inv)?|input_scale|weight\.(quant_state\..*|absmax|quant_map|nested_absmax))$")
"""Names of tensors beside quantised weights: bitsandbytes, GPTQ, AWQ, compressed-tensors."""
TOWERS = ("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model", "blip_vision_model",
          "blip_text_model")
"""Types in transformers that are one tower of a model."""


def check_usable(files: Files, tensors: Tensors) -> tuple[str, ...]:
    """Return notes on what stands beside the weights. Raises `FileError` that says what they are if they are no model.
    """
    config = files.json("config.json") or {}
    adapter = files.json(ADAPTER)
    if any(map(ADAPTED.search, tensors)):
        base = (adapter or {}).get("base_model_name_or_path") or "its base model"
        kind = (adapter or {}).get("peft_type") or "adapter"
        raise FileError(f"{files.name} is a PEFT adapter ({kind}) for {base}, not a model; expected the merged model, "
                        "as peft's merge_and_unload() and save_pretrained() write it")
    quantised = next(filter(QUANTISED.search, tensors), None)
    if quantised is not None or config.get("quantization_config"):
        method = (config.get("quantization_config") or {}).get("quant_method", f"it has {quantised}")
        raise FileError(f"{files.name} holds quantised weights ({method}); expected float32, float16 or bfloat16")
    if config.get("model_type") in TOWERS:
        raise FileError(f"{files.name} is one tower of a model: model_type is {config['model_type']!r}; expected both "
                        f"towers, model_type {config['model_type'].split('_')[0]!r}")
    return () if adapter is None else (f"{ADAPTER} lies beside the weights; the adapter is not applied",)
