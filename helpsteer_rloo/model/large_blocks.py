"""Attention of many queries to many keys as matrix products with the scores in memory.

The kernels behind `scaled_dot_product_attention` on a CPU multiply with MKL. Where oneDNN is faster
(`helpsteer_rloo.model.products`), a large block takes less time as a few products of oneDNN's, though its scores are
written and read: 0.6 to 0.8 of it on an AMD EPYC. Queries go through in tiles, so that a tensor of scores has no more
than `MOST_SCORES`; of a causal block, a tile leaves out the keys that none of its queries sees. Exponentials are those
of two, of scores times log2(e) (`helpsteer_rloo.model.exponentials`). Under autocast products would be in half
precision; callers turn it off.

Axes as in `helpsteer_rloo.model.shared_prefix_cpu`: n ranges, H query heads, K key heads, Q query heads of a key head,
L queries, M keys, E head size; X are the queries of a tile, those of all heads of a key head.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from helpsteer_rloo.model.exponentials import LOG2_E
from helpsteer_rloo.model.products import onednn_leads, product
from helpsteer_rloo.sizes import MOST_SCORES

LEAST_SCORES = 2**17
"""Of a range and key head; with fewer, calls and passes over memory cost more than the products gain."""
CAUSAL_TILE = 384
"""Most tokens in a tile of a causal block. Smaller ones leave out more of what is masked, and multiply slower."""
TILE_MULTIPLE = 64
"""Tokens that tiles have a multiple of, but the last of a range: oneDNN makes a program for every new shape."""


class States(NamedTuple):
    """Queries `[n, H, L, E]` and the keys and values `[n, K, M, E]` that they see, as far as `bias` does not hide them.

    `bias` is `[n, 1, 1, M]`, 0 or -inf, or none. If `causal`, L is M, and a query sees no key behind its own.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scaling: float
    causal: bool = False


def gains(states: States) -> bool:
    """Whether a block is faster here than in the kernels."""
    scores = states.query.shape[1] // states.key.shape[1] * states.query.shape[2] * states.key.shape[2]
    return scores >= LEAST_SCORES and onednn_leads(states.query)


def attend(states: States) -> tuple[Tensor, Tensor]:
    """The output `[n, H, L, E]`, and the log-sum-exps of the scores, `[n, H, L]`."""
    query, key, value, _, scaling, _ = states
    queries_nKLQE = _by_key_head(query, key.shape[1], scaling * LOG2_E)
    keys_nKME, values_nKME = key.contiguous(), value.contiguous()
    out_nKLQE, lse_nKLQ1 = _for_rows(queries_nKLQE), _for_rows(queries_nKLQE[..., :1])
    for tile in _tiles(states):
        weights_XM = tile.scores(queries_nKLQE, keys_nKME)
        peak_X1 = weights_XM.amax(-1, keepdim=True)
        total_X1 = weights_XM.sub_(peak_X1).exp2_().sum(-1, keepdim=True)
        tile.put(out_nKLQE, product(weights_XM, tile.keys(values_nKME).T).div_(total_X1))
        tile.put(lse_nKLQ1, total_X1.log2_().add_(peak_X1))
        del weights_XM  # before there is another tile
    return _by_head(out_nKLQE), _by_head(lse_nKLQ1.mul_(1 / LOG2_E))[..., 0]


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
    query, key, value, _, scaling, _ = states
    queries_nKLQE = _by_key_head(query, key.shape[1], scaling * LOG2_E)
    grads_nKLQE, keys_nKME, values_nKME = _by_key_head(grad, key.shape[1]), key.contiguous(), value.contiguous()
    delta = torch.linalg.vecdot(grad, out)
    lse_nKLQ1 = _by_key_head(lse[..., None], key.shape[1], LOG2_E)
    delta_nKLQ1 = _by_key_head(delta[..., None], key.shape[1])
    d_query_nKLQE = _for_rows(queries_nKLQE)
    d_key_nKEM, d_value_nKEM = (keys_nKME.new_zeros(keys_nKME.mT.shape) for _ in range(2))
    for tile in _tiles(states):
        queries_XE, grads_XE = tile.queries(queries_nKLQE), tile.queries(grads_nKLQE)
        weights_XM = tile.scores(queries_nKLQE, keys_nKME).sub_(tile.queries(lse_nKLQ1)).exp2_()
        tile.keys(d_value_nKEM.mT).T.add_(product(grads_XE.T.contiguous(), weights_XM.T))
        d_scores_XM = product(grads_XE, tile.keys(values_nKME)).sub_(tile.queries(delta_nKLQ1)).mul_(weights_XM)
        del weights_XM
        tile.put(d_query_nKLQE, product(d_scores_XM, tile.keys(keys_nKME).T))
        tile.keys(d_key_nKEM.mT).T.add_(product(queries_XE.T.contiguous(), d_scores_XM.T))
        del d_scores_XM
    return _by_head(d_query_nKLQE.mul_(scaling)), d_key_nKEM.mul_(1 / LOG2_E).mT, d_value_nKEM.mT


class _Tile(NamedTuple):
    """Queries from `first` up to `stop` of the range and key head `where`, and the first `seen` of its keys.

    `bias` is added to the scores of the last keys, as many as it has columns: -inf where a query does not see a key.
    """

    where: tuple[int, int]
    first: int
    stop: int
    seen: int
    bias: Tensor | None

    def queries(self, x_nKLQE: Tensor) -> Tensor:
        """The tile's part of what belongs to queries, `[X, E]`."""
        return x_nKLQE[self.where][self.first : self.stop].flatten(0, 1)

    def put(self, x_nKLQE: Tensor, part_XE: Tensor) -> None:
        """Write the tile's part of what belongs to queries."""
        place_LQE = x_nKLQE[self.where][self.first : self.stop]
        place_LQE.copy_(part_XE.view(place_LQE.shape))

    def keys(self, x_nKME: Tensor) -> Tensor:
        """The tile's part of what belongs to keys, `[M, E]`; a view."""
        return x_nKME[self.where][: self.seen]

    def scores(self, queries_nKLQE: Tensor, keys_nKME: Tensor) -> Tensor:
        """Scores of the tile, `[X, M]`, scaled as the queries are."""
        scores_XM = product(self.queries(queries_nKLQE), self.keys(keys_nKME))
        if self.bias is not None:
            scores_XM[:, self.seen - self.bias.shape[1] :].add_(self.bias)
        return scores_XM


def _tiles(states: States) -> Iterator[_Tile]:
    """The tiles of a block: of about one size in a range, and all of them together every query once."""
    ranges, key_heads, keys = states.key.shape[:3]
    queries, group = states.query.shape[2], states.query.shape[1] // key_heads
    most = max(1, MOST_SCORES // (keys * group))
    most = min(most, CAUSAL_TILE) if states.causal else most
    even = math.ceil(queries / math.ceil(queries / most))
    size = min(most, math.ceil(even / TILE_MULTIPLE) * TILE_MULTIPLE)
    triangle_XL = _triangle(states.query, min(size, queries), group) if states.causal else None
    for index in range(ranges):
        for head in range(key_heads):
            for first in range(0, queries, size):
                stop = min(first + size, queries)
                if triangle_XL is not None:
                    bias = triangle_XL[: (stop - first) * group, : stop - first]
                else:
                    bias = None if states.bias is None else states.bias[index, 0]
                yield _Tile((index, head), first, stop, stop if states.causal else keys, bias)


def _triangle(like: Tensor, size: int, group: int) -> Tensor:
    """-inf at the keys behind a query's own, `[size · group, size]`."""
    return like.new_full((size, size), -torch.inf).triu_(1).repeat_interleave(group, 0)


def _by_key_head(x_nHLE: Tensor, key_heads: int, factor: float = 1.0) -> Tensor:
    """What belongs to queries, times a factor, dense in the order `[n, K, L, Q, E]`."""
    x_nKLQE = x_nHLE.unflatten(1, (key_heads, -1)).transpose(2, 3)
    return torch.mul(x_nKLQE, factor, out=x_nKLQE.new_empty(x_nKLQE.shape))


def _for_rows(like_nKLQE: Tensor) -> Tensor:
    """Room for what belongs to queries, that lies as in a row: `[n, L, K, Q, E]`."""
    ranges, key_heads, queries, group, size = like_nKLQE.shape
    return like_nKLQE.new_empty(ranges, queries, key_heads, group, size).transpose(1, 2)


def _by_head(x_nKLQE: Tensor) -> Tensor:
    """What lies as in a row, `[n, H, L, E]`; a view."""
    return x_nKLQE.transpose(1, 2).flatten(2, 3).transpose(1, 2)
