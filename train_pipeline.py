"""Run the whole pipeline, from preferences to an aligned policy: `python train_pipeline.py --help`."""

from helpsteer_rloo.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline()
