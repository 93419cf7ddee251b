"""Score token ids with a saved reward model through transformers and PEFT alone.

Run as a program in a fresh process: `python stock_scores.py` reads one line of JSON from its standard input, with the
`directory`, a list of id lists (`sequences`) and how the base model is held (`base`), and prints the list of scores as
its last line. It imports nothing of this project: what it loads is what any user of the directory loads.
"""

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Print the scores of the sequences asked for."""
    import torch
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    importlib.import_module("transformers.modeling_utils")  # else loading does so, after the question
    asked = json.loads(sys.stdin.readline())
    directory, base = asked["directory"], asked["base"]
    kwargs = {"num_labels": 1, "dtype": getattr(torch, base["dtype"]), "trust_remote_code": base["trust_remote_code"]}
    kwargs["use_safetensors"] = True
    if base["quantization"]:
        kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(base["quantization"])
    if (Path(directory) / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        name = str(PeftConfig.from_pretrained(directory).base_model_name_or_path)
        revision = base["revision"] or "main"
        model = AutoModelForSequenceClassification.from_pretrained(name, revision=revision, **kwargs)
        model = PeftModel.from_pretrained(model, directory)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(directory, **kwargs)
    if not base["quantization"]:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([ids], device=model.device)).logits.item() for ids in asked["sequences"]]
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
