"""Which models are computed in packed rows: those whose every layer is known to be right there."""

from typing import Any, cast

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

ARCHITECTURES = ("qwen3", "llama")
"""Model types whose packed passes are tested against plain ones."""
UNEVEN_ROTATIONS = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence of a call, and so on what a sequence is computed with."""


def supports_shared_prefix(model: PreTrainedModel) -> bool:
    """Whether a model is of an architecture that shared-prefix attention was held to, with full attention everywhere.

    And on one device: what is read of a row would lie on another one than its tokens.

    Args:
        model: Without wrappers, with adapters in its layers or without.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ()
    full = all(layer == "full_attention" for layer in layers) and getattr(config, "sliding_window", None) is None
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    known = config.model_type in ARCHITECTURES and rotation not in UNEVEN_ROTATIONS
    attends = bool(getattr(model, "_supports_attention_backend", False))
    placed: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    together = len(set(placed.values())) <= 1
    return known and full and attends and together and _has_layers_as_made(model) and not looks_for_tokens(model)


def _has_layers_as_made(model: PreTrainedModel) -> bool:
    """Whether each decoder layer has an attention layer of its own, numbered, that the model's configuration reaches.

    Layers that were copied have a copy of it (depth up-scaling, PEFT's `layer_replication`, attention that PEFT trains
    in full), and would attend to their whole row; a layer that is used twice is narrowed and cached as one.
    """
    layers = getattr(getattr(model, model.base_model_prefix, None), "layers", ())
    attentions = [module for module in model.modules() if isinstance(module, Qwen3Attention | LlamaAttention)]
    numbered = [cast(Any, module).layer_idx for module in attentions] == list(range(len(layers)))
    return numbered and all(cast(Any, module).config is model.config for module in attentions)


def looks_for_tokens(model: nn.Module) -> bool:
    """Whether adapters begin where a sequence has certain tokens (activated LoRA); a row has many sequences."""
    return any(
        isinstance(variant, ALoraLinearVariant)
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for variant in module.lora_variant.values()
    )
