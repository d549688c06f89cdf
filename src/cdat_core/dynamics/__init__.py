"""A simplified joint model of learning rate and sharpness.

Along the sharpest direction the loss is a parabola whose curvature, the sharpness, changes: it
grows as long as training makes progress (progressive sharpening) and shrinks when the parameters
oscillate across the valley (self-stabilization). A tuner closes the loop, because the rate drives
the sharpness and depends on it. The idea comes from the paper (arXiv:2407.06183); the equations are
a choice of this library:

``x <- (1 - eta * lam) * x``, kept at ``|x| >= 1e-6``, and ``lam <- lam + eta * (a * s - b *
x**2)``, kept at ``lam >= 0``, with ``s = 1 / (1 + t / tau)``, while the tuner sees ``slope =
-(lam**2 * x**2 + G**2)`` and ``curvature = lam**3 * x**2 + mu * G**2`` with ``G = G0 * s``.
"""

from cdat_core.dynamics._model import JointModel, ModelState, Trajectory, simulate

__all__ = ["JointModel", "ModelState", "Trajectory", "simulate"]
