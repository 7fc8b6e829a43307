"""Many points of weight space on the same images: a few side by side, their first layers as one convolution."""
import copy
import functools

import torch
from torch import nn

from ..networks import aliases
from .dense import CHUNK, ConvBlock, Fused
from .views import has_view, view

GROUP = 4  # points that are evaluated side by side,
SHARING_GROUP = 12  # when they share the convolution of their first layer


def can_batch(model, sample):
    """Whether sums_at_points takes this network: it has a view, in float32, and no weight under two names."""
    return (has_view(model, sample) and not aliases(model)
            and all(p.dtype == torch.float32 for p in model.parameters()))


def sums_at_points(model, states, coefficients, splits, mask=None, progress=None):
    """Sums [K][len(splits)][3] over each split of the loss, squared loss and right answers at K points.

    Point k combines the `states` with coefficients[k] and is masked; `progress()` is called after each. A point's sums
    do not depend, to the last bit, on the points it is evaluated with.
    """
    flat, views_of = flatten(states)
    keep = torch.ones_like(flat[0], dtype=torch.bool) if mask else None
    for name, kept in (mask or {}).items():
        views_of(keep)[name].copy_(kept)
    first = first_layer_of_points(model, [views_of(row) for row in flat], mask)
    size = min(SHARING_GROUP if first else GROUP, len(coefficients))
    points, plans = flat.new_empty(size, flat.shape[1]), {}
    views_of_points = [views_of(point) for point in points]
    sample = splits[0].batch(slice(0, 2))
    networks = [view(bound(model, point), mask, plans=plans, sample=sample) for point in views_of_points]
    sums = []
    for group in torch.tensor(coefficients, dtype=torch.float32, device=flat.device).split(size):
        torch.ops.lottery.combine_(points[:len(group)], flat, group, keep)
        shared = first and functools.partial(first, group, views_of_points[:len(group)])
        by_split = [sum_of_scores(networks[:len(group)], split, shared).tolist() for split in splits]
        sums += zip(*by_split)
        for _ in group if progress else ():
            progress()
    return sums


def first_layer_of_points(model, states, mask=None):
    """A function (coefficients [K, M], K states between the M `states`, images) -> the results [K, N, C, H, W] of the
    first layer of `model` at the K points, masked; None when the op does not take that layer."""
    network = Fused(model).network
    layer = next(network.children(), None)
    if not (isinstance(network, nn.Sequential) and isinstance(layer, ConvBlock) and layer.few_channels
            and layer.conv.weight.device.type == "cpu" and layer.conv.out_channels % 16 == 0 and len(states) in (2, 3)):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kernel, weight, bias = (names[id(p)] for p in (layer.conv.weight, layer.norm.weight, layer.norm.bias))
    kernels = torch.stack([state[kernel] for state in states])
    if kernel in (mask or {}):
        kernels *= mask[kernel]

    def first(coefficients, points, images):
        affine = (torch.stack([point[name] for point in points]) for name in (weight, bias))
        return torch.ops.lottery.conv_norm_relu_pool_points(
            images, kernels, coefficients, *affine, layer.conv.padding[0], layer.norm.eps)

    return first


@torch.no_grad()
def sum_of_scores(networks, split, first=None):
    """Sums [K, 3] over `split` of the networks' loss, squared loss and correct answers; they share the images.

    `first` gives the results of all networks' first layers at once.
    """
    sums = torch.zeros(len(networks), 3, dtype=torch.float64, device=split.labels.device)
    batch_size = CHUNK if first else 500
    for network in networks if first else ():
        network.ready()
    for start in range(0, len(split), batch_size):
        images, labels = split.batch(slice(start, start + batch_size))
        if first:
            logits = [network.after(1, x) for network, x in zip(networks, first(images))]
        else:
            logits = [network(images) for network in networks]
        sums += torch.ops.lottery.cross_entropy_top1(torch.stack(logits), labels)
    return sums


def flatten(states):
    """(their floating-point values as rows [M, P], a function that gives a row's views by name).

    Convolution weights lie there as channels_last, the order in which the convolutions read them.
    """
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    rows = torch.stack([torch.cat([channels_innermost(state[name]).flatten() for name in names]) for state in states])
    shapes = [channels_innermost(states[0][name]).shape for name in names]

    def views(row):
        parts = row.split([shape.numel() for shape in shapes])
        return {name: part.view(shape).movedim(-1, 1) if len(shape) == 4 else part.view(shape)
                for name, part, shape in zip(names, parts, shapes)}

    return rows, views


def channels_innermost(value):
    return value.movedim(1, -1) if value.ndim == 4 else value


def bound(model, views):
    """A copy of `model` in eval mode whose parameters and buffers are `views`."""
    network = copy.deepcopy(model).eval()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name in views:
            tensor.data = views[name]
    return network
