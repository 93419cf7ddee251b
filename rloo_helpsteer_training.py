"""Train a policy with RLOO against a trained reward model: `python rloo_helpsteer_training.py --help`."""

from helpsteer_rloo.cli import train_policy

if __name__ == "__main__":
    train_policy()
