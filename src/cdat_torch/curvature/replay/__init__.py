"""Exact curvature without a second reverse pass: the autograd graph is replayed along a direction.

<u, H u> is a sum over the operations of the forward pass: the adjoint of each output, which
backward computes anyway, times the second-order change of that output. `recording` watches the
backward pass and then carries the direction through the `graph`, operation by operation.

Each operation has a rule. `registry` explains how to write one; the rules are in

==================  ================================================================================
`elementwise`       functions of one number: exp, tanh, relu, gelu, pow, dropout
`products`          matrix products, convolutions, elementwise products and quotients
`structure`         views, indexing, embeddings, concatenation, padding, masks, upsampling
`reductions`        sums and differences, sum, mean, max, sort, pooling
`softmax`           softmax, log-softmax, log-sum-exp
`normalisation`     layer, group, batch and weight norm
`attention`         fused scaled dot-product attention of the CPU
`loss_functions`    losses that are one operation: nll, mse, huber, binary cross entropy
`double_backward`   all other operations: one general rule, and the list of those it is exact for
==================  ================================================================================

`verification` compares each rule with the double backward of its operation, `versions` says with
which releases of PyTorch graphs are replayed, and `arithmetic` has the accurate inner products.
"""

from cdat_torch.curvature.replay import (
    attention,
    elementwise,
    loss_functions,
    normalisation,
    products,
    reductions,
    softmax,
    structure,
)
from cdat_torch.curvature.replay.recording import Recording
from cdat_torch.curvature.replay.registry import Mismatch, Unsupported
from cdat_torch.curvature.replay.versions import is_supported, require_supported

__all__ = ["Mismatch", "Recording", "Unsupported", "is_supported", "require_supported"]

# Importing the modules registers their rules.
_MODULES = (
    attention, elementwise, loss_functions, normalisation, products, reductions, softmax, structure,
)  # fmt: skip
