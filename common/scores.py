"""Scores of weights from which a network is pruned before any training; the lowest are removed.

Each is a function (model, mask, split) -> {name: score} of the weights in `mask`, at the weights that survive it. Loss
and gradient are of the whole split, unaugmented: the papers' one batch of ten images a class is a split of that size.
`scores_of` prepares the network: BatchNorm normalises by the batch, as in training, and nothing is dropped out.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import UserError
from .masks import apply_mask
from .networks import NORMS, logits_at


def magnitude(model, mask, split):
    """|w|."""
    return {name: model.get_parameter(name).detach().abs() for name in mask}


def snip(model, mask, split):
    """|w dL/dw|: what the loss would change if the weight's connection were taken away (Lee et al. 2019, Eq. 5)."""
    weights = {name: model.get_parameter(name) for name in mask}
    gradient = gradients(model, weights, split)
    return {name: (weight * gradient[name]).detach().abs() for name, weight in weights.items()}


def grasp(model, mask, split):
    """w (H g), g the gradient, H the Hessian: how much the weight does for the norm of the gradient (Wang et al. 2020,
    Eq. 8, whose sign is the opposite: they remove the largest). The loss is at temperature 1, in their code at 200."""
    weights = {name: model.get_parameter(name) for name in mask}
    gradient = gradients(model, weights, split)
    surviving = {name: gradient[name] * mask[name] for name in mask}
    curved = gradients(model, weights, split, times=surviving)
    return {name: (weight * curved[name]).detach() for name, weight in weights.items()}


def synflow(model, mask, split):
    """|w| dR/d|w|, R the sum of the outputs for an image of ones of the network of all parameters' absolute values
    (Tanaka et al. 2020, Eq. 3), in float64. Norms are passed over, as R would not depend on the weights before them.
    Of the split it takes the images' shape alone."""
    model = model.eval().double()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.register_forward_hook(lambda module, inputs, output: inputs[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    weights = {name: model.get_parameter(name) for name in mask}
    ones = torch.ones(1, *split.images.shape[1:], dtype=torch.float64, device=split.images.device)
    flow = torch.autograd.grad(logits_at(model, ones).sum(), list(weights.values()), materialize_grads=True)
    return {name: (weight * g).detach() for (name, weight), g in zip(weights.items(), flow)}


SCORES = {score.__name__: score for score in (magnitude, snip, grasp, synflow)}
PASSES = {"magnitude": 0, "snip": 1, "grasp": 2, "synflow": 0}  # through the split


def scores_of(kind, model, mask, split):
    """{name: score} of the weights in `mask`, of a score by its name; `model` is left as it is. Raises UserError."""
    scratch = copy.deepcopy(model).eval()
    for module in scratch.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    apply_mask(scratch, mask)
    scores = SCORES[kind](scratch, mask, split)
    for name, score in scores.items():
        if not score.isfinite().all():
            raise UserError(f"the {kind} scores of {name} are not finite")
    return scores


def gradients(model, weights, split, times=None):
    """{name: gradient of the mean loss over `split` by a weight}; with vectors `times`, the Hessian times them."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    params = list(weights.values())
    for start in range(0, len(split), 250):
        images, labels = split.batch(slice(start, start + 250))
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = F.cross_entropy(logits_at(model, images), labels, reduction="sum") / len(split)
        parts = torch.autograd.grad(loss, params, create_graph=times is not None, materialize_grads=True)
        if times is not None:
            product = sum((part * times[name]).sum() for name, part in zip(weights, parts))
            parts = torch.autograd.grad(product, params, materialize_grads=True)
        for name, part in zip(weights, parts):
            total[name] += part
    return total
