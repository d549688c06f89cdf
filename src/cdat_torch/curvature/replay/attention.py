"""Scaled dot-product attention by the fused kernel of the CPU.

o = P v with P = softmax(S) and S = q k' scale (+ mask). The kernel saves q, k, v, o and the
logarithm of the normaliser, from which P is recomputed block by block; the memory needed is that of
a block. With lambda the adjoint of o, D = (lambda v' - <lambda, o>) P is the adjoint of S. Then

    S'  = (q' k + q k') scale           P' = P (S' - E S')          o' = P' v + P v'
    second order = sum D (S' - E S')^2 + 2 <D, q' k' scale> + 2 <lambda, P' v'>.

The two products with two tangents are formed as in `cdat_torch.curvature.replay.products`:
<D, q' k' scale> from the product (q + a q') k' and the gradient of k, and <lambda, P' v'> from
(P + P') v' and the gradient of v.

`attention` prepares the inputs, `_flatten` selects some heads of them, `_push_rows` carries the
tangents through some rows of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cdat_torch.curvature.replay.arithmetic import HALF, add_scaled, balance, dot
from cdat_torch.curvature.replay.registry import Node, Pushforward, Tangent, nonlinear

_ROWS = 128
"""Rows of the scores that are in memory at a time."""
_SCORES = 2**17
"""About how many scores: fewer would fit the cache, but cost more calls."""


def _by_math_kernel(node: Node) -> tuple[Callable[..., Tensor], list[Tensor]]:
    causal, scale = node.saved("is_causal"), node.saved("scale")
    grouped = node.saved("query").shape[-3] != node.saved("key").shape[-3]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(
                q, k, v, node.saved("attn_mask"), 0.0, causal, scale=scale, enable_gqa=grouped
            )

    return attend, [node.saved(name) for name in ("query", "key", "value")]


@nonlinear(
    "ScaledDotProductFlashAttentionForCpuBackward0", gradients=(1, 2), reference=_by_math_kernel
)
def attention(node: Node, dq: Tangent, dk: Tangent, dv: Tangent, *mask: Tangent) -> Any:
    """As derived at the head of this module; without dropout and with a constant mask."""
    if node.saved("dropout_p") or any(m is not None for m in mask):
        return NotImplemented
    with_key, with_value = _known_terms(node, dk, dv)
    inputs = _prepare(node, dq, dk, dv)
    tangent, terms = torch.empty_like(inputs.out), []
    for of_queries, of_keys in _chunks(inputs.query, inputs.key):
        heads, part = _flatten(inputs, of_queries, of_keys), tangent[of_queries]
        for rows in _row_blocks(part.shape[-2]):
            do, sums = _push_rows(heads, rows, inputs)
            part[..., rows, :] = do.view_as(part[..., rows, :])
            terms.append(sums)
    if node.first_order:
        return Pushforward([tangent, None])
    squares, key_term, value_term = torch.stack(terms).sum(0, dtype=torch.float64)
    second_order = squares + 2 * (key_term - with_key) / inputs.a + 2 * (value_term - with_value)
    return Pushforward([tangent, None], second_order)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the kernel has saved, and the tangents, zeros for those that are None.

    Attributes
    ----------
    inner : Tensor
        <lambda, o> for each row.
    bias : Tensor or None
        The mask, for all scores.
    a : float or 0-d Tensor
        About |q| / |q'|.
    precision : torch.dtype
        Of the computation: single for tensors of half precision.
    coarse : bool
        Whether the inputs, and so the gradients, are of half precision.
    """

    query: Tensor
    dq: Tensor
    key: Tensor
    dk: Tensor
    value: Tensor
    dv: Tensor
    out: Tensor
    adjoint: Tensor
    inner: Tensor
    normaliser: Tensor
    bias: Tensor | None
    a: Tensor | float
    scale: float
    causal: bool
    coarse: bool
    precision: torch.dtype


def _known_terms(node: Node, dk: Tangent, dv: Tangent) -> tuple[Tensor | float, Tensor | float]:
    """Return <g_k, k'> and <g_v, v'>, 0 where they do not enter."""
    grad_key, grad_value = node.gradient(1), node.gradient(2)
    changed = (dk is not None and grad_key is None) or (dv is not None and grad_value is None)
    if changed and not node.first_order:
        grad_key, grad_value = node.vjp(node.adjoint)[1:3]
    coarse = node.saved("query").dtype in HALF
    with_key = 0.0 if dk is None or grad_key is None or coarse else dot(grad_key, dk)
    with_value = 0.0 if dv is None or grad_value is None or coarse else dot(grad_value, dv)
    return with_key, with_value


def _prepare(node: Node, dq: Tangent, dk: Tangent, dv: Tangent) -> _Inputs:
    query, key, value = (node.saved(name) for name in ("query", "key", "value"))
    out, normaliser, bias = (node.saved(name) for name in ("output", "logsumexp", "attn_mask"))
    scale, adjoint, precision = node.saved("scale"), node.adjoint, normaliser.dtype
    dq, dk, dv = (
        torch.zeros_like(like) if t is None else t
        for t, like in ((dq, query), (dk, key), (dv, value))
    )
    return _Inputs(
        query=query,
        dq=dq,
        key=key,
        dk=dk,
        value=value,
        dv=dv,
        out=out,
        adjoint=adjoint,
        inner=(adjoint * out).sum(-1, keepdim=True, dtype=precision),
        normaliser=normaliser.unsqueeze(-1),
        bias=None if bias is None else bias.expand(*query.shape[:-1], key.shape[-2]),
        a=balance(query, dq),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        causal=node.saved("is_causal"),
        coarse=query.dtype in HALF,
        precision=precision,
    )


_Index = tuple[slice, slice]
"""Some of the batch and some of the heads."""


def _chunks(query: Tensor, key: Tensor) -> Iterator[tuple[_Index, _Index]]:
    """Divide batch and heads so that what is computed at a time stays in the cache.

    Each chunk is an index of the queries and one of the keys, as a head of keys may serve several
    heads of queries (grouped queries).
    """
    number, heads, length, _ = query.shape
    shared = heads // key.shape[-3]
    together = max(1, _SCORES // (min(length, _ROWS) * key.shape[-2]))
    of_batch, of_keys = max(1, together // heads), max(1, min(together, heads) // shared)
    for first in range(0, number, of_batch):
        batch = slice(first, first + of_batch)
        for start in range(0, heads // shared, of_keys):
            stop = start + of_keys
            yield (batch, slice(start * shared, stop * shared)), (batch, slice(start, stop))


def _row_blocks(length: int) -> list[slice]:
    return [slice(first, min(first + _ROWS, length)) for first in range(0, length, _ROWS)]


class _Queries(NamedTuple):
    """Of each query of some heads: (batch times heads, length, width or 1)."""

    q: Tensor
    dq: Tensor
    mixed_q: Tensor
    adjoint: Tensor
    inner: Tensor
    normaliser: Tensor


class _Keys(NamedTuple):
    """Of each key of these heads: (batch times heads, number of keys, width)."""

    k: Tensor
    dk: Tensor
    mixed_k: Tensor
    v: Tensor
    dv: Tensor
    rest_v: Tensor


class _Heads(NamedTuple):
    queries: _Queries
    keys: _Keys
    bias: Tensor | None


def _flatten(inputs: _Inputs, of_queries: _Index, of_keys: _Index) -> _Heads:
    """Return some heads, batch and heads as one dimension."""
    shared = inputs.query.shape[-3] // inputs.key.shape[-3]

    def flat(t: Tensor) -> Tensor:
        return t.reshape(-1, *t.shape[-2:]).to(inputs.precision)

    def by_query(t: Tensor) -> Tensor:
        return flat(t[of_queries])

    def by_key(t: Tensor) -> Tensor:
        return flat(t[of_keys] if shared == 1 else t[of_keys].repeat_interleave(shared, -3))

    q, dq = by_query(inputs.query), by_query(inputs.dq)
    k, dk = by_key(inputs.key), by_key(inputs.dk)
    v, dv = by_key(inputs.value), by_key(inputs.dv)
    queries = _Queries(
        q=q,
        dq=dq,
        mixed_q=add_scaled(q, inputs.a, dq),
        adjoint=by_query(inputs.adjoint),
        inner=by_query(inputs.inner),
        normaliser=by_query(inputs.normaliser),
    )
    keys = _Keys(k=k, dk=dk, mixed_k=add_scaled(k, -inputs.a, dk), v=v, dv=dv, rest_v=v - dv)
    bias = None if inputs.bias is None else inputs.bias[of_queries]
    if bias is not None:
        bias = bias.reshape(-1, *bias.shape[-2:]) if bias.dtype == torch.bool else flat(bias)
    return _Heads(queries, keys, bias)


def _push_rows(heads: _Heads, rows: slice, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Return o' in some rows, and three sums over them.

    They are sum D (S' - E S')^2, <D, (q + a q') k' scale> and <lambda, (P + P') v'>. The gradients
    of half precision are too inexact for <D, q k' scale> and <lambda, P v'>: these two are then
    computed and subtracted here.
    """
    scale, causal, coarse = inputs.scale, inputs.causal, inputs.coarse
    columns = slice(rows.stop if causal else None)
    q, dq, mixed_q, adjoint, inner, normaliser = (t[:, rows] for t in heads.queries)
    k, dk, mixed_k, v, dv, rest_v = (t[:, columns] for t in heads.keys)
    p = torch.baddbmm(normaliser, q, k.mT, beta=-1, alpha=scale)
    if heads.bias is not None:
        bias = heads.bias[:, rows, columns]
        p = p.masked_fill_(~bias, -math.inf) if bias.dtype == torch.bool else p.add_(bias)
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
    known = dot(adjoint, torch.bmm(p, dv)) if coarse else 0.0
    do = torch.bmm(p.add_(dp), dv)
    sums = torch.stack([squares, with_key, dot(adjoint, do) - known])
    return do.baddbmm_(dp, rest_v), sums
