"""Scaled dot-product attention by the fused kernel of the CPU.

o = P v with P = softmax(S) and S = q k' scale (+ mask). The kernel saves q, k, v, o and the
logarithm of the normaliser, from which P comes back block by block; what a block needs is of the
size of a block. With adjoint lambda of o let D = (lambda v' - <lambda, o>) P, the adjoint of S. Then

    S'  = (q' k + q k') scale           P' = P (S' - E S')          o' = P' v + P v'
    second order = sum D (S' - E S')^2 + 2 <D, q' k' scale> + 2 <lambda, P' v'>.

The two products with two tangents are formed as in `cdat_torch.replay.products`:
<D, q' k' scale> from the product (q + a q') k' and the gradient of k, and <lambda, P' v'> from
(P + P') v' and the gradient of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
def attention(node: Node, dq: Tangent, dk: Tangent, dv: Tangent, *mask: Tangent) -> Pushed:
    """The whole of it; the mask is a constant."""
    if node.saved("dropout_p") or any(m is not None for m in mask):
        return NotImplemented
    query, key = node.saved("query"), node.saved("key")
    shared = query.shape[-3] // key.shape[-3]  # query heads for each head of keys

    def by_head(t: Tangent, like: Tensor) -> Tensor:
        t = torch.zeros_like(like) if t is None else t
        if shared > 1 and t.shape[-3] != query.shape[-3]:
            t = t.repeat_interleave(shared, -3)
        return t.reshape(-1, *t.shape[-2:])

    q, k, v = by_head(query, query), by_head(key, key), by_head(node.saved("value"), key)
    dq, dk, dv = by_head(dq, query), by_head(dk, key), by_head(dv, node.saved("value"))
    out = by_head(node.saved("output"), query)
    adjoint = by_head(node.adjoint, query)
    scale = node.saved("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    normaliser = node.saved("logsumexp").reshape(*out.shape[:2], 1)
    bias = node.saved("attn_mask")
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], k.shape[-2]).reshape(*out.shape[:2], -1)

    grad_key, grad_value = node.gradient(1), node.gradient(2)
    if grad_key is None or grad_value is None:
        _, grad_key, grad_value = node.vjp(node.adjoint, None)[:3]
    assert grad_key is not None and grad_value is not None

    a = balance(q, dq)
    mixed_q = add_scaled(q, a, dq) * scale
    mixed_k = add_scaled(k, -a, dk).transpose(1, 2)
    scaled_q, scaled_dq = q * scale, dq * scale
    kt, dkt, vt = k.transpose(1, 2), dk.transpose(1, 2), v.transpose(1, 2)
    rest_v = v - dv
    inner = (adjoint * out).sum(-1, keepdim=True)
    tangent = torch.empty_like(out)
    squares, with_key, with_value = [], [], []
    for start in range(0, out.shape[1], _BLOCK):
        rows = slice(start, min(start + _BLOCK, out.shape[1]))
        seen = min(k.shape[1], rows.stop) if node.saved("is_causal") else k.shape[1]
        p = torch.baddbmm(normaliser[:, rows], scaled_q[:, rows], kt[:, :, :seen], beta=-1)
        if bias is not None:
            part = bias[:, rows, :seen]
            p = p.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else p.add_(part)
        p.exp_()
        if node.saved("is_causal"):
            p.tril_(start)
        score = torch.baddbmm(inner[:, rows], adjoint[:, rows], vt[:, :, :seen], beta=-1).mul_(p)
        ds = torch.bmm(mixed_q[:, rows], dkt[:, :, :seen])
        with_key.append(dot(score, ds))
        ds.baddbmm_(scaled_dq[:, rows], mixed_k[:, :, :seen])  # now S'
        ds.sub_((p * ds).sum(-1, keepdim=True))
        dp = p * ds
        squares.append(dot(score.mul_(ds), ds))
        part_out = torch.bmm(p.add_(dp), dv[:, :seen])
        with_value.append(dot(adjoint[:, rows], part_out))
        tangent[:, rows] = part_out.baddbmm_(dp, rest_v[:, :seen])

    def total(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(dtype=torch.float64)

    key_term = (total(with_key) - _by_shared(grad_key, dk, shared)) / a
    value_term = total(with_value) - _by_shared(grad_value, dv, shared)
    second = total(squares) + 2 * key_term + 2 * value_term
    return Pushed([tangent.view(query.shape), None], second)


def _by_shared(gradient: Tensor, tangent: Tensor, shared: int) -> Tensor:
    """Return <gradient, tangent>, the tangent given for each query head."""
    return dot(gradient.reshape(-1, *gradient.shape[-2:]), tangent[::shared])
