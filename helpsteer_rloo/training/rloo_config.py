"""The settings of the RLOO trainers."""

from dataclasses import dataclass, field

import trl

from helpsteer_rloo.settings.knobs import check_estimators


@dataclass
class RLOOConfig(trl.RLOOConfig):
    """TRL's `RLOOConfig` and eleven more settings; `beta` is the weight of KL wherever it stands."""

    engine: str = field(default="packed", metadata={"help": "'packed' rows with shared prompts, or 'trl': its own."})
    packed_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens in one packed row; a larger group stands alone. Default: 4096, on a CPU 1024."},
    )

    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted from the score of a completion that did not end by itself."}
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted from the score for every token of a completion."}
    )
    rollout_forward_batch_size: int | None = field(
        default=None, metadata={"help": "Completions sampled or scored in one forward pass; default: all at once."}
    )
    rollouts_dir: str | None = field(default=None, metadata={"help": "Directory of the ledger; default: none is kept."})
    kl_estimator: str = field(default="k1", metadata={"help": "Estimate of KL at every token: k1, k2 or k3."})
    kl_in: str = field(
        default="reward", metadata={"help": "'reward': subtracted from it, or 'loss': added to it, with a gradient."}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "KL of a completion, in nats, that `beta` is adapted to after every batch."}
    )
    importance_correction: str = field(
        default="none",
        metadata={"help": "Weights that correct for the sampler's own log-probabilities: none, token or sequence."},
    )
    importance_cap: float = field(default=2.0, metadata={"help": "Largest of those weights."})

    def __post_init__(self) -> None:
        """Check the settings of the estimators, then TRL's own.

        Raises:
            ValueError: one is out of range, or two do not go together.
        """
        check_estimators(self, self.beta)
        super().__post_init__()
