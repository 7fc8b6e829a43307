"""Loss and accuracy of networks, and of many points of weight space."""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .errors import UserError
from .kernels import points, views
from .masks import apply_mask, surviving
from .networks import logits_at, named_failures


class Score(NamedTuple):
    loss: float  # mean cross-entropy
    accuracy: float
    loss_error: float  # standard error of the mean loss over images


@torch.no_grad()
def evaluate(model, split, batch_size=500):
    """Score of `model` on `split` without augmentation, in eval mode; sums in float64. Soft labels are hardened."""
    split = split.hard()
    network = views.made_ready(views.view(model.eval(), surviving(model), sample=split.batch(slice(0, 2))))
    total = torch.zeros(3, dtype=torch.float64, device=split.labels.device)
    for start in range(0, len(split), batch_size):
        images, labels = split.batch(slice(start, start + batch_size))
        logits = logits_at(model, images, network)
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        total += torch.stack([losses.sum(), losses.square().sum(), (logits.argmax(1) == labels).sum().double()])
    return score(*total.tolist(), len(split))


def score(loss_sum, loss_square_sum, correct, n):
    """Score of `n` images from three sums over them."""
    mean = loss_sum / n
    variance = max(loss_square_sum / n - mean * mean, 0.) * n / max(n - 1, 1)
    return Score(mean, correct / n, math.sqrt(variance / n))


def combine(states, weights, mask=None):
    """The weight-space point sum_m weights[m] * states[m], parameters and buffers, with `mask` applied."""
    point = {}
    for name, value in states[0].items():
        if value.is_floating_point():
            value = sum(w * state[name] for w, state in zip(weights, states))
            value = value * mask[name] if mask and name in mask else value
        point[name] = value
    return point


@torch.no_grad()
def refresh_batchnorm(model, split, batch_size=500):
    """Re-estimate BatchNorm's running statistics as plain averages over one pass through `split`.

    Only the BatchNorms are in train mode meanwhile: nothing is dropped out, so that the same is found twice.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    model.eval()
    kept = [m.momentum for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average
            m.train()
        for start in range(0, len(split) if norms else 0, batch_size):
            images, _ = split.batch(slice(start, start + batch_size))
            with named_failures(images):
                model(images)
    finally:
        for m, momentum in zip(norms, kept):
            m.momentum = momentum
        model.eval()


def evaluate_points(model, states, coefficients, splits, mask=None, refresh=None, progress=None):
    """Scores [K][len(splits)] of the K points combine(states, coefficients[k], mask), each on all `splits`.

    `model` is scratch space: it ends at the last point. `refresh`, a split, re-estimates BatchNorm statistics at
    every point; without it the statistics are combined like the weights. `progress()` is called after each point.
    Soft labels are hardened.
    """
    splits = [split.hard() for split in splits]
    if not refresh and points.can_batch(model, splits[0].batch(slice(0, 2))):
        sums = points.sums_at_points(model, states, coefficients, splits, mask, progress)
        model.load_state_dict(combine(states, coefficients[-1], mask))
        return [[score(*total, len(split)) for total, split in zip(row, splits)] for row in sums]
    scores = []
    for weights in coefficients:
        model.load_state_dict(combine(states, weights, mask))
        apply_mask(model, mask or {})  # a weight of two names is masked under the first
        if refresh:
            refresh_batchnorm(model, refresh)
        scores.append([evaluate(model, split) for split in splits])
        if progress:
            progress()
    return scores


def check_losses(losses, what):
    """Raises UserError for losses that are not finite: weights can be, and be too large for their products."""
    for loss in losses:
        if not math.isfinite(loss):
            raise UserError(f"{what}: the loss is {loss}, the training has diverged; try a lower --lr")


def mean_and_std(values):
    """Mean and standard deviation (over n - 1; 0 of a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.
