"""From HelpSteer3 preferences to an aligned Qwen3 policy: reward model, RLOO, evaluation."""

__version__ = "0.1.0"
