"""Train a reward model on HelpSteer3 preferences: `python reward_model_training.py --help`."""

from helpsteer_rloo.cli import train_reward_model

if __name__ == "__main__":
    train_reward_model()
