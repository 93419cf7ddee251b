"""Score token ids with a saved reward model through transformers and PEFT alone.

Run as a program in a fresh process: `python stock_scores.py DIRECTORY IDS.json DTYPE` reads a list of id lists and
prints the list of scores as its last line. It imports nothing of this project: what it loads is what any user of the
directory loads.
"""

import json
import sys
from pathlib import Path


def main(directory: str, ids_file: str, dtype: str) -> None:
    """Print the scores of the sequences in `ids_file`."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForSequenceClassification

    kind = getattr(torch, dtype)
    if (Path(directory) / "adapter_config.json").exists():
        base = str(PeftConfig.from_pretrained(directory).base_model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=kind)
        model = PeftModel.from_pretrained(model, directory)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=kind)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    sequences = json.loads(Path(ids_file).read_text(encoding="utf-8"))
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([ids], device=model.device)).logits.item() for ids in sequences]
    print(json.dumps(scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
