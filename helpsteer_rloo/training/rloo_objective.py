"""What RLOO minimizes: the losses of the completions in a packed row, from log-probabilities and advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpsteer_rloo.model.forward import TokenLogProbs
from helpsteer_rloo.objectives import clipped_policy_losses, kl_terms, truncated_weights, with_weighted_gradient
from helpsteer_rloo.training.rollouts import KnownTokens, sums_by_completion
from helpsteer_rloo.training.row_stats import RowStats, row_stats, with_gaps, with_weights


@dataclass(frozen=True)
class RLOOObjective:
    """The settings of the loss.

    `clip` is how far a completion's probability ratio may fall below 1 and rise above it. With `kl_in_loss`, the
    estimate of KL is a term of the loss; otherwise it has been subtracted from the rewards. `importance_correction` is
    "none", "token" or "sequence", whose weights are at most `importance_cap`.
    """

    clip: tuple[float, float]
    kl_estimator: str
    kl_in_loss: bool
    importance_correction: str
    importance_cap: float

    def losses(
        self,
        found: TokenLogProbs,
        known: KnownTokens,
        lengths: Sequence[int],
        counted_B: Tensor,
        advantage_B: Tensor,
        kl_coef: float,
    ) -> tuple[Tensor, RowStats]:
        """Losses of the completions of a row, `[B]`, and what is counted.

        Args:
            found: Log-probabilities and entropies of the row's completion tokens under the policy, `[T]`.
            known: Log-probabilities of the same tokens that no gradient goes through.
            lengths: Tokens of each completion.
            counted_B: Which completions count.
            advantage_B: Of each completion.
            kl_coef: Weight of KL in the loss.
        """
        log_ratio_T, weights = found.log_probs - known.old_T, self._importance_weights(known, lengths)
        if weights is not None and self.importance_correction == "token":
            log_ratio_T = with_weighted_gradient(log_ratio_T, weights.to(log_ratio_T.dtype))
        log_ratio_B = sums_by_completion(log_ratio_T, lengths) * counted_B
        losses_B = clipped_policy_losses(log_ratio_B, advantage_B, *self.clip)
        if weights is not None and self.importance_correction == "sequence":
            losses_B = losses_B * weights.to(losses_B.dtype)
        if self.kl_in_loss and known.reference_T is not None:
            terms_T = kl_terms(found.log_probs, known.reference_T, self.kl_estimator)
            losses_B = losses_B + kl_coef * sums_by_completion(terms_T, lengths) * counted_B
        tokens_B = torch.tensor(lengths, device=counted_B.device) * counted_B
        entropy_B = sums_by_completion(found.entropies, lengths) * counted_B
        stats = row_stats(log_ratio_B.exp(), advantage_B, entropy_B, tokens_B, self.clip)
        return losses_B, with_weights(with_gaps(stats, known), weights, self.importance_cap)

    def _importance_weights(self, known: KnownTokens, lengths: Sequence[int]) -> Tensor | None:
        """Importance weights of a row's tokens, `[T]`, or of its completions, `[B]`; None without a correction."""
        if self.importance_correction == "none" or known.drawn_T is None:
            return None
        log_weights_T = known.old_T - known.drawn_T
        whole = self.importance_correction == "sequence"
        return truncated_weights(
            sums_by_completion(log_weights_T, lengths) if whole else log_weights_T, self.importance_cap
        )
