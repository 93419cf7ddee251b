"""Score token ids with a saved reward model through transformers and PEFT alone.

Run as a program in a fresh process: `python stock_scores.py DIRECTORY IDS.json BASE.json` reads a list of id lists and
how the base model is held, and prints the list of scores as its last line. It imports nothing of this project: what it
loads is what any user of the directory loads.
"""

import json
import sys
from pathlib import Path


def main(directory: str, ids_file: str, base_file: str) -> None:
    """Print the scores of the sequences in `ids_file`."""
    import torch
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    base = json.loads(Path(base_file).read_text(encoding="utf-8"))
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
    sequences = json.loads(Path(ids_file).read_text(encoding="utf-8"))
    model.eval()
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([ids], device=model.device)).logits.item() for ids in sequences]
    print(json.dumps(scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
