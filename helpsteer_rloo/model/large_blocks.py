"""Attention of many queries to many keys that they all see, as matrix products with the scores in memory.

The kernels behind `scaled_dot_product_attention` on a CPU multiply with MKL. Where oneDNN is faster
(`helpsteer_rloo.model.products`), a large block takes less time as a few products of oneDNN's, though its scores are
written and read: 0.7 of it forward and 0.6 backward on an AMD EPYC. Queries go through in tiles,
so that no more than `MOST_SCORES` exist. Exponentials are those of two, which take a quarter of the time of those of e
where these are MKL's; scores are so many times larger.

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


class Block(NamedTuple):
    """Queries `[n, H, L, E]` and the keys and values `[n, K, M, E]` that they see, as far as `bias` does not hide them.

    `bias` is `[n, 1, 1, M]`, or none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scaling: float


def gains(block: Block) -> bool:
    """Whether a block is faster here than in the kernels."""
    scores = block.query.shape[1] // block.key.shape[1] * block.query.shape[2] * block.key.shape[2]
    return scores >= LEAST_SCORES and onednn_leads(block.query)


def attend(block: Block) -> tuple[Tensor, Tensor]:
    """The output `[n, H, L, E]`, and the log-sum-exps of the scores, `[n, H, L]`."""
    query, key, value, _, scaling = block
    queries_nKXE, keys_nKME = _by_key_head(query, key, scaling * _LOG2_E), key.contiguous()
    values_nKEM = value.mT.contiguous()
    out_nKXE, lse_nKX1 = torch.empty_like(queries_nKXE), queries_nKXE.new_empty(*queries_nKXE.shape[:3], 1)
    for where, tile in _tiles(block):
        scores_XM = _scores(queries_nKXE[where][tile], keys_nKME[where], _bias(block, where))
        peak_X1 = scores_XM.amax(-1, keepdim=True)
        weights_XM = scores_XM.sub_(peak_X1).exp2_()
        total_X1 = weights_XM.sum(-1, keepdim=True)
        out_nKXE[where][tile] = product(weights_XM, values_nKEM[where]).div_(total_X1)
        lse_nKX1[where][tile] = total_X1.log2_().add_(peak_X1)
    return out_nKXE.view(query.shape), lse_nKX1.mul_(1 / _LOG2_E).view(query.shape[:3])


def gradients(block: Block, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    With p = exp(s q kᵀ - lse) and g the gradient for the output:  dv = pᵀ g;  z = p · (g vᵀ - Σ g · out);
    dq = s z k;  dk = s zᵀ q (Dao et al. 2022, arXiv 2205.14135, appendix B).

    Args:
        block: As in the forward pass.
        grad: `[n, H, L, E]`, for the output.
        out: As `grad`, the output of the whole softmax that the block is a part of.
        lse: `[n, H, L]`, its log-sum-exps.
    """
    query, key, value, _, scaling = block
    queries_nKXE, grads_nKXE = _by_key_head(query, key, scaling * _LOG2_E), _by_key_head(grad, key, 1.0)
    keys_nKME, values_nKME = key.contiguous(), value.contiguous()
    rows = queries_nKXE.shape[:3]
    lse_nKX1, delta_nKX1 = (x.reshape(*rows, 1) for x in (lse * _LOG2_E, torch.linalg.vecdot(grad, out)))
    d_query_nKXE = torch.empty_like(queries_nKXE)
    d_key_nKEM, d_value_nKEM = (keys_nKME.new_zeros(keys_nKME.mT.shape) for _ in range(2))
    for where, tile in _tiles(block):
        queries_XE, grads_XE = queries_nKXE[where][tile], grads_nKXE[where][tile]
        weights_XM = _scores(queries_XE, keys_nKME[where], _bias(block, where)).sub_(lse_nKX1[where][tile]).exp2_()
        d_value_nKEM[where].add_(product(grads_XE.T.contiguous(), weights_XM.T))
        d_scores_XM = product(grads_XE, values_nKME[where]).sub_(delta_nKX1[where][tile]).mul_(weights_XM)
        d_query_nKXE[where][tile] = product(d_scores_XM, keys_nKME[where].T)
        d_key_nKEM[where].add_(product(queries_XE.T.contiguous(), d_scores_XM.T))
    return d_query_nKXE.mul_(scaling).view(query.shape), d_key_nKEM.mul_(1 / _LOG2_E).mT, d_value_nKEM.mT


def _tiles(block: Block) -> Iterator[tuple[tuple[int, int], slice]]:
    """Every range and key head, and the queries of it that go through together."""
    ranges, key_heads, keys = block.key.shape[:3]
    queries = block.query.shape[1] // key_heads * block.query.shape[2]
    size = max(1, MOST_SCORES // keys)
    for index in range(ranges):
        for head in range(key_heads):
            for start in range(0, queries, size):
                yield (index, head), slice(start, start + size)


def _by_key_head(x: Tensor, key: Tensor, scaling: float) -> Tensor:
    """`[n, H, L, E]` as `[n, K, X, E]`, scaled, in memory of its own."""
    scaled = torch.mul(x, scaling, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return scaled.view(len(x), key.shape[1], -1, x.shape[-1])


def _bias(block: Block, where: tuple[int, int]) -> Tensor | None:
    return None if block.bias is None else block.bias[where[0], 0]


def _scores(queries_XE: Tensor, keys_ME: Tensor, bias_1M: Tensor | None) -> Tensor:
    """Of queries that are scaled by log2(e) besides."""
    scores_XM = product(queries_XE, keys_ME)
    return scores_XM if bias_1M is None else scores_XM.add_(bias_1M)
