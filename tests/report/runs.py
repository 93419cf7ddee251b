"""A run's directory, written by hand: as the stages leave it, without any training."""

import gzip
import json

from helpsteer_rloo.run_dir import write_json, write_text

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "before\u2028after\u2029end",
    "right to left: \u202eabc\u202c and \u2066isolated",
    "A" * 100_000,
    "lone \ud800 surrogate \udfff here",
    "<!--<script>",
    "{{ 7 * 7 }} {% raw %} &amp; &lt;b&gt;",
    "NUL \x00 and bell \x07",
    "",
]
"""Texts that a model may write."""


def estimate(value, low=None, high=None, count=200):
    return {"value": value, "interval": [low, high], "count": count}


def data_report(domain="general"):
    def split(pairs):
        lengths = {"width": 5, "counts": [1, pairs - 3, 2]}
        return {
            "pairs": pairs,
            "prompts": pairs // 2,
            "domains": {domain: pairs - 3, "stem": 3},
            "languages": {"english": pairs},
            "strengths": {"1": 3, "2": pairs - 3},
            "tokens": {},
            "lengths": dict.fromkeys(("prompt", "chosen", "rejected"), lengths),
        }

    return {
        "source": "rows.jsonl",
        "fingerprint": "0123456789abcdef",
        "rows": 120,
        "bad_rows": {"json": 2},
        "not_selected": {"language": 5},
        "dropped": {"tie": 7},
        "pairs": 100,
        "max_length": 96,
        "overlong": {"policy": "cut", "over_max_length": 1, "context_cut": 1, "response_cut": 0},
        "splits": {"train": split(80), "validation": split(20)},
    }


def heldout(accuracy=0.8, domain="general", concern=False):
    part = estimate(accuracy, accuracy - 0.05, accuracy + 0.05)
    return {
        "heldout_accuracy": accuracy,
        "interval": [accuracy - 0.05, accuracy + 0.05],
        "heldout_pairs": 200,
        "better_than_chance": accuracy - 0.05 > 0.5,
        "by_domain": {domain: part, "stem": estimate(accuracy - 0.1, accuracy - 0.2, accuracy)},
        "by_strength": {"1": part, "2": part},
        "by_turns": {"1": part},
        "by_length": {"1 to 9": part, "10 to 20": part},
        "calibration": {
            "reliability": [
                {"confidence": 0.55, "right": 0.5, "count": 20},
                {"confidence": 0.95, "right": 0.97, "count": 90},
            ],
            "ece": estimate(0.03, 0.01, 0.05),
        },
        "biases": {
            "length": {
                "model_prefers_more": estimate(0.6, 0.5, 0.7),
                "labels_prefer_more": estimate(0.5, 0.4, 0.6),
                "bias": estimate(0.1, 0.05, 0.15),
            },
            "markdown": None,
        },
        "probes": {"over_max_length": 0, "repetition": {"change": estimate(-1.0, -2.0, -0.5)}, "position": 1e-7},
        "findings": [{"sentence": "It likes length more than they do.", "concern": concern}],
    }


def evaluation(gold=0.3):
    def change(name, before, after):
        moved = estimate(after - before, after - before - 0.1, after - before + 0.1, 60)
        return {f"{name}_before": before, f"{name}_after": after, f"{name}_change": moved}

    return {
        "prompts": 60,
        **change("reward", -0.5, 2.5),
        **change("guard", -0.4, 2.0),
        **change("gold", 0.4, 0.4 + gold),
        "win_rate": 0.9,
        "win_rate_interval": [0.8, 0.95],
        "length_controlled_win_rate": None,
        "guard_win_rate": estimate(0.8, 0.7, 0.9, 60),
        "kl": 2.5,
        "kl_interval": [2.0, 3.0],
        "length_before": 10.0,
        "length_after": 9.0,
        "eos_before": 1.0,
        "eos_after": 0.9,
        "best_of_n": {
            "samples": 4,
            "curve": [
                {"n": 1, "kl": 0.0, "reward": -0.5, "guard": -0.4, "gold": 0.4},
                {"n": 4, "kl": 0.64, "reward": 1.5, "guard": 1.2, "gold": 0.6},
            ],
            "at_the_policys_kl": {
                "kl": 2.5,
                "n": 4.0,
                "reaches_the_kl": False,
                "reward": {"best_of_n": 1.5, "policy_minus_best_of_n": estimate(1.0, 0.5, 1.5, 60)},
            },
        },
    }


def answers(count=60, texts=()):
    rows = []
    for number in range(count):
        after = texts[number % len(texts)] if texts else f"answer {number}, better"
        rows.append(
            {
                "prompt": [
                    {"role": "user", "content": f"Question {number}: {'αβγ' if number % 7 == 0 else 'name a tree'}"}
                ],
                "before": {"text": f"answer {number}", "ended": True, "reward": number * 0.1, "gold": 0.5},
                "after": {"text": after, "ended": number % 5 > 0, "reward": 3.0 - number * 0.05, "gold": 0.75},
                "domain": ("general", "stem", "code")[number % 3],
            }
        )
    return rows


def pairs(count=40, texts=()):
    return [
        {
            "row": number,
            "domain": ("general", "stem")[number % 2],
            "language": "english",
            "strength": 1 + number % 3,
            "prompt": [
                {"role": "user", "content": "Hello!"},
                {"role": "assistant", "content": "What would you like?"},
                {"role": "user", "content": f"Pair {number}"},
            ],
            "chosen": {
                "text": texts[number % len(texts)] if texts else "good",
                "score": 1.0 + number * 0.01,
                "tokens": 2,
            },
            "rejected": {"text": "bad", "score": 0.5 - number * 0.01, "tokens": 1},
        }
        for number in range(count)
    ]


def json_text(rows):
    """JSON lines in which everything but ASCII is escaped, as lone surrogates have to be."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def reward_log(steps=6):
    machine = {"time": 0.0, "step_seconds": 0.2, "tokens_per_second": 900.0, "peak_memory_bytes": 2**30}
    return [
        {"step": 5 * n, "loss": 0.7 / n, "accuracy": 1 - 0.5 / n, "margin": 0.1 * n, "machine": machine}
        for n in range(1, steps + 1)
    ]


def policy_log(steps=10, reward=0.3):
    machine = {"time": 0.0, "step_seconds": 0.4, "tokens_per_second": 500.0, "peak_memory_bytes": 2**31}
    return [
        {
            "step": 5 * n,
            "reward": reward * n,
            "objective": reward * n - 0.1,
            "kl_per_completion": 0.2 * n,
            "entropy": 2.0 - 0.01 * n,
            "completions/mean_length": 9.5,
            "missing_eos": 0.0,
            "sampler_gap/mean": 4e-7,
            "grad_norm": 1.0,
            "machine": machine,
        }
        for n in range(1, steps + 1)
    ]


def write_watch(directory, steps=(0, 10, 20)):
    directory.mkdir(parents=True)
    for step in steps:
        rows = [
            {
                "reward": 0.1 * step + n,
                "guard": 0.05 * step + n,
                "kl": 0.1 * step,
                "surprise": 9.0,
                "length": 9,
                "ended": True,
            }
            for n in range(4)
        ]
        (directory / f"step-{step:06d}.jsonl.gz").write_bytes(gzip.compress(json_text(rows).encode()))


def finish(root, stage, outputs, directory=None):
    """The marker of a stage that has ended, and of the directory that it made."""
    write_json(root / "stages" / f"{stage}.json", {"key": f"key of {root} {stage}", "outputs": outputs, "seconds": 1.5})
    if directory is not None:
        mark(root, stage, directory)


def mark(root, stage, directory):
    write_json(directory / "stage.json", {"stage": stage, "key": f"key of {root} {stage}", "execution": None})


SETTINGS = {
    "pipeline": {"seed": 7, "name": "small", "guard": True, "max_length": 96},
    "reward": {"learning_rate": 0.001, "output_dir": "elsewhere/reward_model", "seed": 7},
    "rloo": {"kl_coef": 0.1, "output_dir": "elsewhere/policy", "reward_model_path": "elsewhere/reward_model"},
}


def start(root, settings=None, stages=None, passed=None):
    """What a run is started with; `stages` are those it plans, `passed` those behind it: older runs say neither."""
    write_json(
        root / "run.json",
        {
            **({} if stages is None else {"stages": stages}),
            **({} if passed is None else {"passed": passed}),
            "command": "helpsteer-rloo demo --seed 7",
            "settings": SETTINGS if settings is None else settings,
            "provenance": {"python": "3.11.7", "trl": "1.16.0", "commit": "abc123"},
        },
    )


def make_run(root, *, domain="general", texts=(), accuracy=0.8, gold=0.3, count=60, concern=False):
    """A finished run of the pipeline, with a guard."""
    start(root)
    write_json(root / "data.json", data_report(domain))
    finish(root, "data", {"rows": 120})
    for stage, directory, value in (
        ("reward_model", "reward_model", accuracy),
        ("guard", "guard_model", accuracy - 0.05),
    ):
        outputs = {"directory": f"elsewhere/{directory}", "steps": 30, "bad_steps": 0}
        finish(root, stage, outputs, root / directory)
        write_json(root / directory / "reward_model.json", {"heldout": heldout(value, domain, concern)})
        write_text(root / directory / "metrics.jsonl", json_text(reward_log()))
        finish(root, "verification" if stage == "reward_model" else "guard_verification", {})
    write_text(root / "pairs.jsonl", json_text(pairs(texts=texts)))
    training = {"steps": 50, "bad_steps": 0, "episodes": 3200.0}
    finish(root, "rloo", {"directory": "elsewhere/policy", **training}, root / "policy")
    watch = {"curve": [], "best_step": 20, "verdict": None, "rolled_back_to": None}
    write_json(root / "policy" / "policy.json", {"training": {**training, "watch": watch}})
    write_text(root / "policy" / "metrics.jsonl", json_text(policy_log()))
    write_watch(root / "policy" / "watch")
    finish(root, "evaluation", evaluation(gold))
    write_text(root / "samples.jsonl", json_text(answers(count, texts)))
    return root


def make_small_run(root):
    """A run that has only read its data, whose page is made quickly."""
    start(root)
    write_json(root / "data.json", data_report())
    finish(root, "data", {"rows": 120})
    return root
