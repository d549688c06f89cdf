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
    shared = query.shape[-3] // key.shape[-3]  # query heads for each head of keys

    def by_head(t: Tangent, like: Tensor) -> Tensor:
        t = torch.zeros_like(like) if t is None else t
        if t.shape[-3] != query.shape[-3]:
            t = t.repeat_interleave(shared, -3)
        return t.reshape(-1, *t.shape[-2:])

    scale = node.saved("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    bias = node.saved("attn_mask")
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2]).flatten(0, -3)
    out = by_head(node.saved("output"), query)
    heads = _Heads(
        q=by_head(query, query) * scale,
        k=by_head(key, key),
        v=by_head(value, value),
        dq=by_head(dq, query) * scale,
        dk=by_head(dk, key),
        dv=by_head(dv, value),
        out=out,
        adjoint=by_head(node.adjoint, query),
        normaliser=node.saved("logsumexp").reshape(*out.shape[:2], 1),
        bias=bias,
        causal=node.saved("is_causal"),
    )
    a = balance(heads.q, heads.dq)
    tangent, squares, with_key, with_value = _by_blocks(heads, a)
    if node.first_order:
        return Pushed([tangent.view(query.shape[:-1] + value.shape[-1:]), None])
    grad_key, grad_value = node.gradient(1), node.gradient(2)
    if (dk is not None and grad_key is None) or (dv is not None and grad_value is None):
        grad_key, grad_value = node.vjp(node.adjoint)[1:3]
    with_key = (with_key - _by_shared(grad_key, heads.dk, shared)) / a
    with_value = with_value - _by_shared(grad_value, heads.dv, shared)
    return Pushed([tangent.view(query.shape[:-1] + value.shape[-1:]), None],
                  squares + 2 * with_key + 2 * with_value)  # fmt: skip


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


def _by_shared(gradient: Tensor | None, tangent: Tensor, shared: int) -> Tensor | float:
    """Return <gradient, tangent>, the tangent given for each query head; 0 of a constant."""
    if gradient is None:
        return 0.0
    return dot(gradient.reshape(-1, *gradient.shape[-2:]), tangent[::shared])
