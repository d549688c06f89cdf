"""Mini-batch reconstruction: an autoencoder, a denoiser and two variational autoencoders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdat_lab.tasks._blocks import digit_images, signals, task_with_held_out
from cdat_lab.tasks._networks import gelu_mlp, mlp_params, squared_loss, tanh_mlp
from cdat_lab.tasks._patches import CLASSES as QUARTERS
from cdat_lab.tasks._patches import pieces
from cdat_lab.tasks._task import Array, Float64, Namespace, Task

CODE = 6
"""Dimensions of the code of the variational autoencoders."""
PIXELS = 64


def digit_autoencoder(seed: int) -> Task:
    """Return the task of compressing digits to eight numbers."""
    training, sizes = 1200, (PIXELS, 48, 8, 48, PIXELS)
    generator = np.random.default_rng(seed)
    data = digit_images(generator, training, 500)[0]
    return task_with_held_out(
        name="digit-autoencoder",
        description=(
            f"{training} images of 8 x 8 handwritten digits (scikit-learn) to reconstruct; a "
            f"{'-'.join(map(str, sizes))} tanh network, squared loss"
        ),
        inputs=data,
        targets=data,
        training=training,
        params=mlp_params(sizes, generator),
        model=tanh_mlp,
        criterion=squared_loss,
        steps={"rmsprop": 900},
    )


def photo_denoiser(seed: int) -> Task:
    """Return the task of removing noise from pieces of two photographs.

    The noise in the data is fixed; more is added in each step.
    """
    training, samples, sizes = 1500, 2000, (PIXELS, 96, 32, 96, PIXELS)
    generator = np.random.default_rng(seed)
    clean = pieces(np.arange(samples) % QUARTERS, 8, generator).mean(axis=-1)
    clean = np.reshape(clean, (samples, PIXELS))
    clean = (clean - clean.mean()) / clean.std()
    noisy = clean + 0.3 * generator.standard_normal(clean.shape)
    order = generator.permutation(samples)
    return task_with_held_out(
        name="photo-denoiser",
        description=(
            f"{training} noisy pieces of 8 x 8 pixels of two photographs (scikit-learn), to which "
            f"each step adds noise, to denoise; a {'-'.join(map(str, sizes))} gelu network, "
            "squared loss"
        ),
        inputs=noisy[order],
        targets=clean[order],
        training=training,
        params=mlp_params(sizes, generator),
        model=denoiser,
        criterion=squared_loss,
        steps={"adam": 800},
        noise=(PIXELS,),
    )


def denoiser(xp: Namespace, params: Sequence[Array], inputs: Array, noise: Array | None) -> Array:
    """Return the outputs of a network, which gets noisier inputs in training."""
    return gelu_mlp(xp, params, inputs if noise is None else inputs + 0.3 * noise)


def digit_vae(seed: int) -> Task:
    """Return a variational autoencoder of digits."""
    training = 1200
    generator = np.random.default_rng(seed)
    images = digit_images(generator, training, 500)[0]
    what = f"{training} images of 8 x 8 handwritten digits (scikit-learn)"
    return _vae("digit-vae", what, generator, images, training, 48, {"adam": 900})


def signal_vae(seed: int) -> Task:
    """Return a variational autoencoder of generated signals."""
    training = 1500
    generator = np.random.default_rng(seed)
    data = signals(generator, training + 500)[0]
    what = f"{training} generated signals"
    return _vae("signal-vae", what, generator, data, training, 64, {"rmsprop": 900})


def _vae(
    name: str,
    what: str,
    generator: np.random.Generator,
    data: Float64,
    training: int,
    width: int,
    steps: dict[str, int],
) -> Task:
    features = data.shape[1]
    encoder = mlp_params((features, width, 2 * CODE), generator)
    decoder = mlp_params((CODE, width, features), generator)
    return task_with_held_out(
        name=name,
        description=(
            f"{what}; a variational autoencoder with a code of {CODE} numbers, sampled in each "
            f"step, and tanh layers of width {width}; squared loss plus divergence of the code"
        ),
        inputs=data,
        targets=data,
        training=training,
        params=(*encoder, *decoder),
        model=variational_autoencoder,
        criterion=variational_loss,
        steps=steps,
        noise=(CODE,),
    )


def variational_autoencoder(
    xp: Namespace, params: Sequence[Array], inputs: Array, noise: Array | None
) -> Array:
    """Return the reconstruction with mean and log-variance of the code.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    params : sequence of Array
        Four arrays of the encoder and four of the decoder.
    inputs : Array, shape (rows, features)
    noise : Array or None, shape (rows, 6)
        Samples the code; without it the code is its mean.

    Returns
    -------
    Array, shape (rows, features + 12)
    """
    code = tanh_mlp(xp, params[:4], inputs)
    mean, log_variance = code[:, :CODE], code[:, CODE:]
    sample = mean if noise is None else mean + xp.exp(0.5 * log_variance) * noise
    return xp.concat([tanh_mlp(xp, params[4:], sample), code], axis=-1)


def variational_loss(xp: Namespace, outputs: Array, targets: Array) -> Array:
    """Return half the squared error plus the divergence of the code from N(0, 1), mean of rows."""
    features = targets.shape[-1]
    residual = outputs[:, :features] - targets
    mean = outputs[:, features : features + CODE]
    log_variance = outputs[:, features + CODE :]
    divergence = mean * mean + xp.exp(log_variance) - 1 - log_variance
    return 0.5 * (xp.sum(residual * residual) + xp.sum(divergence)) / outputs.shape[0]
