"""Model cards: what a saved model is, what it was trained on, how it scores, and how to load it."""

from collections.abc import Mapping
from typing import Any

LICENCE_NOTE = (
    "The weights derive from the base model and are under its licence. HelpSteer3, if it was the data, is CC-BY-4.0 "
    "(NVIDIA)."
)


def reward_model_card(record: Mapping[str, Any]) -> str:
    """The README.md of a reward model's directory."""
    heldout, data = record["heldout"], record["data"]
    low, high = heldout["interval"]
    imports, loading = _loading(record)
    by_domain = "\n".join(f"| {name} | {_row(part)} |" for name, part in heldout["by_domain"].items())
    by_strength = "\n".join(f"| strength {name} | {_row(part)} |" for name, part in heldout["by_strength"].items())
    return f"""---
base_model: {record["base_model"]}
library_name: {"peft" if record["adapter"] else "transformers"}
pipeline_tag: text-classification
tags: [reward-model, rlhf, helpsteer-rloo]
---
# Reward model

A scalar reward model (Bradley-Terry) from `{record["base_model"]}`, trained by helpsteer-rloo on {data["pairs"]}
preference pairs of `{data["source"]}` (data fingerprint `{data["fingerprint"]}`), at most
{record["rendering"]["max_length"]} tokens, thinking mode {"on" if record["thinking"] else "off"}.

| held-out pairs | accuracy, 95 % interval, count |
|---|---|
| all | {heldout["heldout_accuracy"]:.3f} [{low:.3f}, {high:.3f}], n = {heldout["heldout_pairs"]} |
{by_domain}
{by_strength}

```python
{imports}

path = "."  # this directory
messages = [{{"role": "user", "content": "…"}}]
response = "…"
{loading}
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True, enable_thinking={record["thinking"]}
)
ids = tokenizer(prompt, add_special_tokens=False).input_ids
ids += tokenizer(response, add_special_tokens=False).input_ids + [{record["rendering"]["end_of_turn_id"]}]
score = model(input_ids=torch.tensor([ids])).logits[0, 0]
```

The last id ends the turn; a response that was cut off is scored without it. Prompt and response are tokenized apart, as
they are when a policy samples. {LICENCE_NOTE}
"""


def _loading(record: Mapping[str, Any]) -> tuple[str, str]:
    """The imports and the lines by which stock libraries load a reward model."""
    base = record["base"]
    held = f"dtype=torch.{base['dtype']}" + (f", revision={base['revision']!r}" if base["revision"] else "")
    loading = (
        "base = PeftConfig.from_pretrained(path).base_model_name_or_path\n"
        f"model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, {held})\n"
        "model = PeftModel.from_pretrained(model, path).eval()"
        if record["adapter"]
        else f"model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.{base['dtype']}).eval()"
    )
    imports = "import torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer" + (
        "\nfrom peft import PeftConfig, PeftModel" if record["adapter"] else ""
    )
    return imports, loading


def _row(part: Mapping[str, Any]) -> str:
    low, high = part["interval"]
    return f"{part['value']:.3f} [{low:.3f}, {high:.3f}], n = {part['count']}"


def _other_rewards(settings: Mapping[str, Any]) -> str:
    names = settings["reward_functions"]
    if not names:
        return ""
    return f"Rewards besides the reward model: {names}; weights {settings.get('reward_weights') or 'of 1'}.\n"


def policy_card(record: Mapping[str, Any]) -> str:
    """The README.md of a policy's directory."""
    training, settings = record["training"], record["settings"]
    return f"""---
base_model: {record["base_model"]}
library_name: {"peft" if record["adapter"] else "transformers"}
pipeline_tag: text-generation
tags: [rloo, rlhf, helpsteer-rloo]
---
# Policy

`{record["base_model"]}` trained by helpsteer-rloo with RLOO (Ahmadian et al. 2024, arXiv 2402.14740) against the
reward model `{record["reward_model"]}`: {training["episodes"]:.0f} completions, {training["steps"]} optimizer steps,
K = {settings["rloo_k"]}, KL coefficient {settings["kl_coef"]} ({settings["kl_estimator"]} in the {settings["kl_in"]}),
learning rate {settings["learning_rate"]}, missing-EOS penalty {settings["missing_eos_penalty"]},
importance correction: {settings["importance_correction"]}.
{_other_rewards(settings)}
The pipeline's `summary.json` says how much better it became on held-out prompts; the script alone does not judge it.
{LICENCE_NOTE}
"""
