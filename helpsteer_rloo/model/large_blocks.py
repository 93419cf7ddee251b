"""Attention of many queries to keys that they all see, as matrix products with the scores in memory.

The kernels behind `scaled_dot_product_attention` on a CPU multiply with MKL. Where oneDNN is faster
(`helpsteer_rloo.model.products`), a large block takes less time as a few products of oneDNN's, though its scores are
written and read: 0.7 of it forward and 0.6 backward on an AMD EPYC. Queries go through in tiles, so that a tensor of
scores has no more than `MOST_SCORES`. Exponentials are those of two, of scores times log2(e): they take a quarter of
the time of those of e where these are MKL's. Under autocast products would be in half precision; callers turn it off.

Axes as in `helpsteer_rloo.model.shared_prefix_cpu`: n ranges, H query heads, K key heads, L queries, M keys, E head
size; X are the queries of all heads of a key head.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from helpsteer_rloo.model.products import onednn_leads, product
from helpsteer_rloo.sizes import MOST_SCORES

LEAST_SCORES = 2**17
"""Of a range and key head; with fewer, calls and passes over memory cost more than the products gain."""
_LOG2_E = math.log2(math.e)


class States(NamedTuple):
    """Queries `[n, H, L, E]` and the keys and values `[n, K, M, E]` that they see, as far as `bias` does not hide them.

    `bias` is `[n, 1, 1, M]`, 0 or -inf, or none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scaling: float


def gains(states: States) -> bool:
    """Whether a block is faster here than in the kernels."""
    scores = states.query.shape[1] // states.key.shape[1] * states.query.shape[2] * states.key.shape[2]
    return scores >= LEAST_SCORES and onednn_leads(states.query)


def attend(states: States) -> tuple[Tensor, Tensor]:
    """The output `[n, H, L, E]`, and the log-sum-exps of the scores, `[n, H, L]`."""
    query, key, value, _, scaling = states
    queries_nKXE = _by_key_head(query * (scaling * _LOG2_E), key.shape[1])
    keys_nKME, values_nKEM = key.contiguous(), value.mT.contiguous()
    out_nKXE, lse_nKX1 = torch.empty_like(queries_nKXE), queries_nKXE.new_empty(*queries_nKXE.shape[:3], 1)
    for where, tile in _tiles(states):
        weights_XM = _scores(queries_nKXE[where][tile], keys_nKME[where], states, where)
        peak_X1 = weights_XM.amax(-1, keepdim=True)
        total_X1 = weights_XM.sub_(peak_X1).exp2_().sum(-1, keepdim=True)
        out_nKXE[where][tile] = product(weights_XM, values_nKEM[where]).div_(total_X1)
        lse_nKX1[where][tile] = total_X1.log2_().add_(peak_X1)
        del weights_XM  # before there is another tile
    return out_nKXE.view(query.shape), lse_nKX1.mul_(1 / _LOG2_E).view(query.shape[:3])


def gradients(states: States, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    With p = exp(s q kᵀ - lse) and g the gradient for the output:  dv = pᵀ g;  z = p · (g vᵀ - Σ g · out);
    dq = s z k;  dk = s zᵀ q (Dao et al. 2022, arXiv 2205.14135, appendix B).

    Args:
        states: As in the forward pass.
        grad: `[n, H, L, E]`, for the output.
        out: As `grad`, the output of the whole softmax that the block is a part of.
        lse: `[n, H, L]`, its log-sum-exps.
    """
    query, key, value, _, scaling = states
    queries_nKXE = _by_key_head(query * (scaling * _LOG2_E), key.shape[1])
    grads_nKXE, keys_nKME, values_nKME = _by_key_head(grad, key.shape[1]), key.contiguous(), value.contiguous()
    delta = torch.linalg.vecdot(grad, out)
    lse_nKX1, delta_nKX1 = (x.reshape(*queries_nKXE.shape[:3], 1) for x in (lse * _LOG2_E, delta))
    d_query_nKXE = torch.empty_like(queries_nKXE)
    d_key_nKEM, d_value_nKEM = (keys_nKME.new_zeros(keys_nKME.mT.shape) for _ in range(2))
    for where, tile in _tiles(states):
        queries_XE, grads_XE = queries_nKXE[where][tile], grads_nKXE[where][tile]
        weights_XM = _scores(queries_XE, keys_nKME[where], states, where).sub_(lse_nKX1[where][tile]).exp2_()
        d_value_nKEM[where].add_(product(grads_XE.T.contiguous(), weights_XM.T))
        d_scores_XM = product(grads_XE, values_nKME[where]).sub_(delta_nKX1[where][tile]).mul_(weights_XM)
        del weights_XM
        d_query_nKXE[where][tile] = product(d_scores_XM, keys_nKME[where].T)
        d_key_nKEM[where].add_(product(queries_XE.T.contiguous(), d_scores_XM.T))
        del d_scores_XM
    return d_query_nKXE.mul_(scaling).view(query.shape), d_key_nKEM.mul_(1 / _LOG2_E).mT, d_value_nKEM.mT


def _tiles(states: States) -> Iterator[tuple[tuple[int, int], slice]]:
    """Every range and key head, and the queries of it that go through together."""
    ranges, key_heads, keys = states.key.shape[:3]
    queries = states.query.shape[1] // key_heads * states.query.shape[2]
    size = max(1, MOST_SCORES // keys)
    for index in range(ranges):
        for head in range(key_heads):
            for start in range(0, queries, size):
                yield (index, head), slice(start, start + size)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """`[n, H, L, E]` as `[n, K, X, E]`."""
    return x.contiguous().view(len(x), key_heads, -1, x.shape[-1])


def _scores(queries_XE: Tensor, keys_ME: Tensor, states: States, where: tuple[int, int]) -> Tensor:
    """Those of a tile, `[X, M]`, times log2(e), which the queries are scaled by."""
    scores_XM = product(queries_XE, keys_ME)
    return scores_XM if states.bias is None else scores_XM.add_(states.bias[where[0], 0])
