"""Log-probabilities of token ids under a saved policy through transformers alone.

Run as a program in a fresh process: `python stock_log_probs.py DIRECTORY IDS.json BASE.json` reads a list of id lists
and how the weights are held, and prints, as its last line, one list a sequence: the log-probability of every token
after the first, in nats. It imports nothing of this project.
"""

import json
import sys
from pathlib import Path


def main(directory: str, ids_file: str, base_file: str) -> None:
    """Print the log-probabilities of the sequences in `ids_file`."""
    import torch
    from transformers import AutoModelForCausalLM

    base = json.loads(Path(base_file).read_text(encoding="utf-8"))
    kwargs = {"dtype": getattr(torch, base["dtype"]), "trust_remote_code": base["trust_remote_code"]}
    model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, **kwargs)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu").eval()
    found = []
    for ids in json.loads(Path(ids_file).read_text(encoding="utf-8")):
        given = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            log_probs = model(input_ids=given).logits[0, :-1].float().log_softmax(-1)
        found.append(log_probs.gather(1, given[0, 1:, None])[:, 0].tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
