"""Many points of weight space on the same images: a few side by side, their first layers as one convolution."""
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ..networks import aliases
from .dense import CHUNK, ConvBlock, Fused
from .views import has_view, made_ready, view

GROUP = 4  # points that are evaluated side by side,
SHARING_GROUP = 12  # on a CPU when they share the convolution of their first layer
ALIGNMENT = 64  # floats: where every tensor of every point begins, so that a library reads all alike
GPU_PIXELS = 2000 * 32 * 32  # that a GPU is given at a time, in at most 2,000 images


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
    size = min(SHARING_GROUP if first else GROUP, len(coefficients)) if flat.device.type == "cpu" else GROUP
    points, plans = flat.new_zeros(size, flat.shape[1]), {}
    views_of_points = [views_of(point) for point in points]
    sample = splits[0].batch(slice(0, 2))
    networks = [view(bound(model, point), mask, plans=plans, sample=sample) for point in views_of_points]
    splits = [as_read(split) for split in splits]
    sums = []
    for group in torch.tensor(coefficients, dtype=torch.float32, device=flat.device).split(size):
        torch.ops.lottery.combine_(points[:len(group)], flat, group, keep)
        shared = first and first(group, views_of_points)
        by_split = [sum_of_scores(networks[:len(group)], split, shared) for split in splits]
        sums.append(torch.stack(by_split, 1))
        for _ in sums[-1].tolist() if progress else ():  # a bar waits for what it counts
            progress()
    return torch.cat(sums).tolist()


def as_read(split):
    """A split whose images lie as the convolutions of a GPU read them here: channels_last, as the weights are."""
    if split.images.device.type == "cpu":
        return split
    return replace(split, images=split.images.contiguous(memory_format=torch.channels_last))


def first_layer_of_points(model, states, mask=None):
    """A function (coefficients [K, M], at least K states, which are K points between the M `states`) -> a function
    images -> the results [K or more, N, C, H, W] of the first layer of `model` there, masked; None: it is no op's."""
    network = Fused(model).network
    layer = next(network.children(), None)
    if not (isinstance(network, nn.Sequential) and isinstance(layer, ConvBlock) and layer.few_channels):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kernel, *affine = (names[id(p)] for p in (layer.conv.weight, layer.norm.weight, layer.norm.bias))
    padding, eps = layer.conv.padding[0], layer.norm.eps
    if layer.conv.weight.device.type != "cpu":
        return side_by_side(kernel, affine, padding, eps)
    if layer.conv.out_channels % 16 or len(states) not in (2, 3):
        return None
    kernels = torch.stack([state[kernel] for state in states])
    if kernel in (mask or {}):
        kernels *= mask[kernel]

    def first(coefficients, points):
        weight, bias = (torch.stack([point[name] for point in points[:len(coefficients)]]) for name in affine)
        return lambda images: torch.ops.lottery.conv_norm_relu_pool_points(
            images, kernels, coefficients, weight, bias, padding, eps)

    return first


def side_by_side(kernel, affine, padding, eps):
    """first_layer_of_points of a GPU, from the parameters' names: the kernels of all points are one convolution's.

    All of them, also where there are fewer points: a convolution of another shape might round otherwise.
    """
    def first(coefficients, points):
        kernels = torch.cat([point[kernel] for point in points])
        weight, bias = (torch.stack([point[name] for point in points]) for name in affine)
        return lambda images: torch.ops.lottery.norm_relu_pool_points(
            F.conv2d(images, kernels, padding=padding), weight, bias, eps)

    return first


@torch.no_grad()
def sum_of_scores(networks, split, first=None):
    """Sums [K, 3] over `split` of the networks' loss, squared loss and correct answers; they share the images.

    `first` gives the results of all networks' first layers at once.
    """
    sums = torch.zeros(len(networks), 3, dtype=torch.float64, device=split.labels.device)
    batch_size = images_at_once(split, first)
    ready = [made_ready(network) for network in networks]
    for start in range(0, len(split), batch_size):
        images, labels = split.batch(slice(start, start + batch_size))
        if first:
            logits = [network.after(1, x) for network, x in zip(networks, first(images))]
        else:
            logits = [logits_at(images) for logits_at in ready]
        sums += torch.ops.lottery.cross_entropy_top1(torch.stack(logits), labels)
    return sums


def images_at_once(split, first):
    """How many images are evaluated at a time."""
    if split.images.device.type == "cpu":
        return CHUNK if first else 500
    return min(2000, max(1, GPU_PIXELS // split.images[0, 0].numel()))


def flatten(states):
    """(their floating-point values as rows [M, P], a function that gives a row's views by name).

    Convolution weights lie there as channels_last, the order in which the convolutions read them.
    """
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    rows = torch.stack([torch.cat([padded(channels_innermost(state[name])) for name in names]) for state in states])
    shapes = [channels_innermost(states[0][name]).shape for name in names]

    def views(row):
        parts = row.split([-(-shape.numel() // ALIGNMENT) * ALIGNMENT for shape in shapes])
        tensors = [part[:shape.numel()].view(shape) for part, shape in zip(parts, shapes)]
        return {name: tensor.movedim(-1, 1) if tensor.ndim == 4 else tensor for name, tensor in zip(names, tensors)}

    return rows, views


def padded(value):
    """The values in a row that ends on a multiple of ALIGNMENT."""
    return F.pad(value.flatten(), (0, -value.numel() % ALIGNMENT))


def channels_innermost(value):
    return value.movedim(1, -1) if value.ndim == 4 else value


def bound(model, views):
    """A copy of `model` in eval mode whose parameters and buffers are `views`."""
    own = {id(p): nn.Parameter(views[name], p.requires_grad) for name, p in model.named_parameters()}
    own |= {id(buffer): views[name] for name, buffer in model.named_buffers() if name in views}
    return copy.deepcopy(model, own).eval()
