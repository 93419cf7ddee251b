"""An adapter merged into the weights it stands on."""

from peft import PeftModel
from transformers import PreTrainedModel

from helpsteer_rloo.model.loading import Model


def merged(model: Model) -> PreTrainedModel:
    """The model with its adapter merged in, W + s B A for LoRA, and its trained head in place; changed itself.

    Raises:
        ValueError: the merged weights are not finite.
    """
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model
