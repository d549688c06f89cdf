"""Scaled dot-product attention by the fused kernel of the CPU.

o = P v with P = softmax(S) and S = q k' scale (+ mask). The kernel saves q, k, v, o and the
logarithm of the normaliser, from which P comes back block by block; what a block needs is of the
size of a block. With lambda the adjoint of o, D = (lambda v' - <lambda, o>) P is that of S. Then

    S'  = (q' k + q k') scale           P' = P (S' - E S')          o' = P' v + P v'
    second order = sum D (S' - E S')^2 + 2 <D, q' k' scale> + 2 <lambda, P' v'>.

The two products with two tangents are formed as in `cdat_torch.replay.products`:
<D, q' k' scale> from the product (q + a q') k' and the gradient of k, and <lambda, P' v'> from
(P + P') v' and the gradient of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cdat_torch.replay.arithmetic import add_scaled, balance, dot
from cdat_torch.replay.registry import Node, Pushed, Tangent, rule

_BLOCK = 128
"""Rows of the scores that are in memory at a time."""
_ENTRIES = 2**17
"""About how many scores."""


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
    scale = node.saved("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    causal, adjoint = node.saved("is_causal"), node.adjoint
    grad_key, grad_value = node.gradient(1), node.gradient(2)
    changed = (dk is not None and grad_key is None) or (dv is not None and grad_value is None)
    if changed and not node.first_order:
        grad_key, grad_value = node.vjp(adjoint)[1:3]
    dq, dk, dv = (
        torch.zeros_like(like) if t is None else t
        for t, like in ((dq, query), (dk, key), (dv, value))
    )
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    tangent, terms = torch.empty_like(out), []
    for some in _groups(query, key):

        def by_head(t: Tensor, some: slice = some) -> Tensor:
            t = t[some]
            if t.shape[-3] != query.shape[-3]:
                t = t.repeat_interleave(shared, -3)
            return t.reshape(-1, *t.shape[-2:])

        heads = _Heads(
            q=by_head(query) * scale,
            k=by_head(key),
            v=by_head(value),
            dq=by_head(dq) * scale,
            dk=by_head(dk),
            dv=by_head(dv),
            out=by_head(out),
            adjoint=by_head(adjoint),
            normaliser=normaliser[some].reshape(-1, query.shape[-2], 1),
            bias=None if bias is None else by_head(bias),
            causal=causal,
        )
        a = balance(heads.q, heads.dq)
        part, squares, with_key, with_value = _by_blocks(heads, a)
        tangent[some] = part.view_as(tangent[some])
        if node.first_order:
            continue
        with_key = (with_key - _inner(grad_key, dk, some)) / a
        terms.append(squares + 2 * with_key + 2 * (with_value - _inner(grad_value, dv, some)))
    return Pushed([tangent, None], torch.stack(terms).sum() if terms else None)


def _groups(query: Tensor, key: Tensor) -> list[slice]:
    """Divide the batch so that what is computed at a time stays in the cache."""
    number, heads, length, _ = query.shape
    together = max(1, _ENTRIES // (heads * min(length, _BLOCK) * key.shape[-2]))
    return [slice(start, start + together) for start in range(0, number, together)]


class _Heads(NamedTuple):
    """What attention reads, by head: (batch times heads, length, width); q and dq are scaled."""

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    out: Tensor
    adjoint: Tensor
    normaliser: Tensor
    bias: Tensor | None
    causal: bool


def _by_blocks(h: _Heads, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o', sum D (S' - E S')^2, <D, (q + a q') k'> and <lambda, (P + P') v'>."""
    mixed_q, mixed_k = add_scaled(h.q, a, h.dq), add_scaled(h.k, -a, h.dk).mT
    rest_v = h.v - h.dv
    inner = (h.adjoint * h.out).sum(-1, keepdim=True)
    tangent = torch.empty_like(h.out)
    terms = []
    for start in range(0, h.out.shape[1], _BLOCK):
        rows = slice(start, min(start + _BLOCK, h.out.shape[1]))
        seen = min(h.k.shape[1], rows.stop) if h.causal else h.k.shape[1]
        p = _probabilities(h, rows, seen)
        d = torch.baddbmm(inner[:, rows], h.adjoint[:, rows], h.v.mT[:, :, :seen], beta=-1).mul_(p)
        ds = torch.bmm(mixed_q[:, rows], h.dk.mT[:, :, :seen])
        with_key = dot(d, ds)
        ds.baddbmm_(h.dq[:, rows], mixed_k[:, :, :seen])  # now S'
        ds.sub_((p * ds).sum(-1, keepdim=True))
        dp = p * ds
        squares = dot(d.mul_(ds), ds)
        part = torch.bmm(p.add_(dp), h.dv[:, :seen])
        terms.append(torch.stack([squares, with_key, dot(h.adjoint[:, rows], part)]).double())
        tangent[:, rows] = part.baddbmm_(dp, rest_v[:, :seen])
    return tangent, *torch.stack(terms).sum(0).unbind()  # type: ignore[return-value]


def _probabilities(h: _Heads, rows: slice, seen: int) -> Tensor:
    """Return P in some rows, from the saved logarithms of its normalisers."""
    p = torch.baddbmm(h.normaliser[:, rows], h.q[:, rows], h.k.mT[:, :, :seen], beta=-1)
    if h.bias is not None:
        bias = h.bias[:, rows, :seen]
        p = p.masked_fill_(~bias, -math.inf) if bias.dtype == torch.bool else p.add_(bias)
    p.exp_()
    return p.tril_(rows.start) if h.causal else p


def _inner(gradient: Tensor | None, tangent: Tensor, some: slice) -> Tensor | float:
    """Return <gradient, tangent> in a part of the batch; 0 of a constant."""
    return 0.0 if gradient is None else dot(gradient[some], tangent[some])
