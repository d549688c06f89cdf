"""Scaled dot-product attention by the fused kernel of the CPU.

o = P v with P = softmax(S) and S = q k' scale (+ mask). The kernel saves q, k, v, o and the
logarithm of the normaliser, from which P comes back block by block; what a block needs is of the
size of a block. With lambda the adjoint of o, D = (lambda v' - <lambda, o>) P is that of S. Then

    S'  = (q' k + q k') scale           P' = P (S' - E S')          o' = P' v + P v'
    second order = sum D (S' - E S')^2 + 2 <D, q' k' scale> + 2 <lambda, P' v'>.

The two products with two tangents are formed as in `cdat_torch.curvature.replay.products`:
<D, q' k' scale> from the product (q + a q') k' and the gradient of k, and <lambda, P' v'> from
(P + P') v' and the gradient of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cdat_torch.curvature.replay.arithmetic import HALF, add_scaled, balance, dot
from cdat_torch.curvature.replay.registry import Node, Pushed, Tangent, rule

_BLOCK = 128
"""Rows of the scores that are in memory at a time."""
_ENTRIES = 2**17
"""About how many scores: fewer would fit the cache, but cost more calls."""

_Index = tuple[slice, slice]
"""Some of the batch and some of the heads."""


def _in_parts(node: Node) -> tuple[Callable[..., Tensor], list[Tensor]]:
    causal, scale = node.saved("is_causal"), node.saved("scale")
    grouped = node.saved("query").shape[-3] != node.saved("key").shape[-3]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(
                q, k, v, node.saved("attn_mask"), 0.0, causal, scale=scale, enable_gqa=grouped
            )

    return attend, [node.saved(name) for name in ("query", "key", "value")]


@rule("ScaledDotProductFlashAttentionForCpuBackward0", gradients=(1, 2), forward=_in_parts)
def attention(node: Node, dq: Tangent, dk: Tangent, dv: Tangent, *mask: Tangent) -> Any:
    """As in the head of this module; dropout and a mask that depends on parameters are not."""
    if node.saved("dropout_p") or any(m is not None for m in mask):
        return NotImplemented
    query, key, value = (node.saved(name) for name in ("query", "key", "value"))
    out, normaliser, bias = (node.saved(name) for name in ("output", "logsumexp", "attn_mask"))
    shared = query.shape[-3] // key.shape[-3]  # query heads for each head of keys
    scale, causal = node.saved("scale"), node.saved("is_causal")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    adjoint, precision = node.adjoint, normaliser.dtype  # single for tensors of half precision
    coarse = query.dtype in HALF
    grad_key, grad_value = node.gradient(1), node.gradient(2)
    changed = (dk is not None and grad_key is None) or (dv is not None and grad_value is None)
    if changed and not node.first_order:
        grad_key, grad_value = node.vjp(adjoint)[1:3]
    with_key = 0.0 if dk is None or grad_key is None or coarse else dot(grad_key, dk)
    with_value = 0.0 if dv is None or grad_value is None or coarse else dot(grad_value, dv)
    dq, dk, dv = (
        torch.zeros_like(like) if t is None else t
        for t, like in ((dq, query), (dk, key), (dv, value))
    )
    inner = (adjoint * out).sum(-1, keepdim=True, dtype=precision)
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])

    def flat(t: Tensor) -> Tensor:
        return t.reshape(-1, *t.shape[-2:]).to(t.dtype if t.dtype == torch.bool else precision)

    a = balance(query, dq)
    tangent, terms = torch.empty_like(out), []
    for some, of_keys in _groups(query, key):

        def by_head(t: Tensor, some: _Index = some) -> Tensor:
            return flat(t[some])

        def by_query_head(t: Tensor, some: _Index = of_keys) -> Tensor:
            return flat(t[some] if shared == 1 else t[some].repeat_interleave(shared, -3))

        q, tangent_q = by_head(query), by_head(dq)
        k, tangent_k = by_query_head(key), by_query_head(dk)
        v, tangent_v = by_query_head(value), by_query_head(dv)
        queries = _Queries(
            q=q,
            dq=tangent_q,
            mixed_q=add_scaled(q, a, tangent_q),
            adjoint=by_head(adjoint),
            inner=by_head(inner),
            normaliser=by_head(normaliser.unsqueeze(-1)),
        )
        keys = _Keys(
            k=k,
            dk=tangent_k,
            mixed_k=add_scaled(k, -a, tangent_k),
            v=v,
            dv=tangent_v,
            rest_v=v - tangent_v,
        )
        here, there = None if bias is None else by_head(bias), tangent[some]
        for rows in _blocks(query.shape[-2]):
            part, found = _push(queries, keys, here, scale, rows, causal=causal, coarse=coarse)
            there[..., rows, :] = part.view_as(there[..., rows, :])
            terms.append(found)
    if node.first_order:
        return Pushed([tangent, None])
    sums = torch.stack(terms).sum(0, dtype=torch.float64)
    second = sums[0] + 2 * (sums[1] - with_key) / a + 2 * (sums[2] - with_value)
    return Pushed([tangent, None], second)


def _groups(query: Tensor, key: Tensor) -> Iterator[tuple[_Index, _Index]]:
    """Divide batch and heads so that what is computed at a time stays in the cache.

    Each part is an index of what belongs to queries and one of what belongs to keys.
    """
    number, heads, length, _ = query.shape
    shared = heads // key.shape[-3]
    together = max(1, _ENTRIES // (min(length, _BLOCK) * key.shape[-2]))
    of_batch, of_keys = max(1, together // heads), max(1, min(together, heads) // shared)
    for first in range(0, number, of_batch):
        batch = slice(first, first + of_batch)
        for start in range(0, heads // shared, of_keys):
            stop = start + of_keys
            yield (batch, slice(start * shared, stop * shared)), (batch, slice(start, stop))


def _blocks(length: int) -> list[slice]:
    """Divide the rows."""
    return [slice(first, min(first + _BLOCK, length)) for first in range(0, length, _BLOCK)]


class _Queries(NamedTuple):
    """What belongs to queries, by head: (batch times heads, length, width or 1)."""

    q: Tensor
    dq: Tensor
    mixed_q: Tensor
    adjoint: Tensor
    inner: Tensor
    normaliser: Tensor


class _Keys(NamedTuple):
    """What belongs to keys, by head: (batch times heads, number of keys, width)."""

    k: Tensor
    dk: Tensor
    mixed_k: Tensor
    v: Tensor
    dv: Tensor
    rest_v: Tensor


def _push(
    queries: _Queries,
    keys: _Keys,
    mask: Tensor | None,
    scale: float,
    rows: slice,
    *,
    causal: bool,
    coarse: bool,
) -> tuple[Tensor, Tensor]:
    """Return o' in some rows, and there sum D (S' - E S')^2, <D, (q + a q') k'> and so on.

    The third sum is <lambda, (P + P') v'>. The gradients of `coarse` numbers are too far from what
    is computed here: <D, q k'> and <lambda, P v'>, which they tell otherwise, are subtracted.
    """
    seen = slice(rows.stop if causal else None)
    q, dq, mixed_q, adjoint, inner, normaliser = (t[:, rows] for t in queries)
    k, dk, mixed_k, v, dv, rest_v = (t[:, seen] for t in keys)
    p = torch.baddbmm(normaliser, q, k.mT, beta=-1, alpha=scale)
    if mask is not None:
        here = mask[:, rows, seen]
        p = p.masked_fill_(~here, -math.inf) if here.dtype == torch.bool else p.add_(here)
    p.exp_()
    if causal:
        p.tril_(rows.start)
    d = torch.baddbmm(inner, adjoint, v.mT, beta=-1).mul_(p)
    ds = torch.bmm(mixed_q, dk.mT).mul_(scale)
    with_key = dot(d, ds)
    if coarse:
        with_key = with_key - dot(d, torch.bmm(q, dk.mT)) * scale
    ds.baddbmm_(dq, mixed_k.mT, alpha=scale)  # now S'
    ds.sub_((p * ds).sum(-1, keepdim=True))
    dp = p * ds
    squares = dot(d.mul_(ds), ds)
    rest = dot(adjoint, torch.bmm(p, dv)) if coarse else 0.0
    tangent = torch.bmm(p.add_(dp), dv)
    terms = torch.stack([squares, with_key, dot(adjoint, tangent) - rest])
    return tangent.baddbmm_(dp, rest_v), terms
