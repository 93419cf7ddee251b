"""Log-probabilities of token ids under a saved policy through transformers alone.

Run as a program in a fresh process: `python stock_log_probs.py` reads one line of JSON from its standard input, with
the `directory`, a list of id lists (`sequences`) and how the weights are held (`base`), and prints, as its last line,
one list a sequence: the log-probability of every token after the first, in nats. It imports nothing of this project.
"""

import importlib
import json
import sys


def main() -> None:
    """Print the log-probabilities of the sequences asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    importlib.import_module("transformers.modeling_utils")  # else loading does so, after the question
    asked = json.loads(sys.stdin.readline())
    directory, base = asked["directory"], asked["base"]
    kwargs = {"dtype": getattr(torch, base["dtype"]), "trust_remote_code": base["trust_remote_code"]}
    model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, **kwargs)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu").eval()
    found = []
    for ids in asked["sequences"]:
        given = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            log_probs = model(input_ids=given).logits[0, :-1].float().log_softmax(-1)
        found.append(log_probs.gather(1, given[0, 1:, None])[:, 0].tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
