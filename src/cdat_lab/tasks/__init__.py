"""Tasks: data, initial weights and a loss, the same problem under every framework."""

from __future__ import annotations

from collections.abc import Callable

from cdat_lab.tasks._autoencoders import (
    digit_autoencoder,
    digit_vae,
    photo_denoiser,
    signal_vae,
)
from cdat_lab.tasks._characters import characters
from cdat_lab.tasks._classifiers import (
    deep_relu,
    digit_labels,
    noisy_digits,
    noisy_signals,
    residual_photos,
    residual_teacher,
    shifted_digits,
    signal_labels,
    tumours,
    warped_signals,
    wide_spirals,
)
from cdat_lab.tasks._deep_linear import deep_linear
from cdat_lab.tasks._digits import digits, digits_1536, digits_cross_entropy
from cdat_lab.tasks._embeddings import co_occurrences, contrastive, ratings
from cdat_lab.tasks._language import source_transformer, topics_transformer
from cdat_lab.tasks._patches import patches
from cdat_lab.tasks._physics import burgers, oscillator
from cdat_lab.tasks._recurrent import chaos, frequencies
from cdat_lab.tasks._regression import counts, deep_tanh, diabetes, outliers
from cdat_lab.tasks._task import Task, check_name
from cdat_lab.tasks._teacher_student import teacher_student

__all__ = ["FULL_BATCH", "MINI_BATCH", "TASKS", "Task", "check_name"]

FULL_BATCH: dict[str, Callable[[int], Task]] = {
    "characters": characters,
    "deep-linear": deep_linear,
    "digits": digits,
    "digits-1536": digits_1536,
    "digits-cross-entropy": digits_cross_entropy,
    "patches": patches,
    "teacher-student": teacher_student,
}
"""Tasks to study a full batch with."""

MINI_BATCH: dict[str, Callable[[int], Task]] = {
    "burgers": burgers,
    "chaos": chaos,
    "co-occurrences": co_occurrences,
    "contrastive": contrastive,
    "counts": counts,
    "deep-relu": deep_relu,
    "deep-tanh": deep_tanh,
    "diabetes": diabetes,
    "digit-autoencoder": digit_autoencoder,
    "digit-labels": digit_labels,
    "digit-vae": digit_vae,
    "frequencies": frequencies,
    "noisy-digits": noisy_digits,
    "noisy-signals": noisy_signals,
    "oscillator": oscillator,
    "outliers": outliers,
    "photo-denoiser": photo_denoiser,
    "ratings": ratings,
    "residual-photos": residual_photos,
    "residual-teacher": residual_teacher,
    "shifted-digits": shifted_digits,
    "signal-labels": signal_labels,
    "signal-vae": signal_vae,
    "source-transformer": source_transformer,
    "topics-transformer": topics_transformer,
    "tumours": tumours,
    "warped-signals": warped_signals,
    "wide-spirals": wide_spirals,
}
"""Tasks to train in mini-batches, each with held-out data; those of the suite `self-tuning`."""

TASKS = FULL_BATCH | MINI_BATCH
