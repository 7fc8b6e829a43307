"""Tangents on their way through a network: what each layer does to a direction, and the curvature that norms add.

    linearised = {node: tangents.linearise(node.module, its input, the cotangent at its output), ...}
    curvature, t = tangents.carry(linearised, path, source, t, channel)

A tangent [n, D, c, ...] is the derivative of a value [n, C, ...] of n images along D directions, in c of its channels.
"""
import operator
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import graph

ALL = slice(None)  # channels
CURVED = (nn.GroupNorm, nn.InstanceNorm2d)
WITH_RULE = (nn.Conv2d, nn.Linear, graph.ChannelLinear, *CURVED, *graph.BATCH_NORMS, *graph.SLOPED, *graph.POOLS,
             *graph.UNCHANGED, *graph.LINEAR)

#############################################
#                    Norms                  #
#############################################


class Norm(NamedTuple):
    """A norm at some images: y = gamma xhat + beta, xhat = (z - mean) / s over the P positions of each of G groups.

    With h the cotangent at xhat, a centred tangent d at z has the curvature, with a = xhat . d,
    (3 (h . xhat) a^2 / P - 2 a (h . d) - (h . xhat) d . d) / (P s^2), and the tangent gamma (d - xhat a / P) / s at y.
    """

    xhat: torch.Tensor  # [n, G, 1, P]
    h: torch.Tensor  # [n, G, 1, P]
    k: torch.Tensor  # [n, G, 1]: h . xhat
    weight: torch.Tensor  # [n, G, 1]: 1 / (P s^2)
    scale: torch.Tensor  # [n, G, 1, P]: gamma / s

    @classmethod
    def at(cls, module, x, cotangent):
        z = x.reshape(len(x), getattr(module, "num_groups", x.shape[1]), 1, -1)
        inverse = (z.var(-1, correction=0, keepdim=True) + module.eps).rsqrt()
        xhat = (z - z.mean(-1, keepdim=True)) * inverse
        gamma = x.new_ones(x.shape[1]) if module.weight is None else module.weight
        gamma = per_channel(gamma, x).expand_as(x).reshape_as(z)
        h = gamma * cotangent.reshape_as(z)
        return cls(xhat, h, (h * xhat).sum(-1), inverse[..., 0].square() / z.shape[-1], gamma * inverse)

    def centred(self, t):
        """d [n, G, D, P] of tangents t [n, D, c, ...] at z, and a = xhat . d [n, G, D]."""
        d = t.reshape(*t.shape[:2], self.xhat.shape[1], -1).transpose(1, 2)
        d = d - d.mean(-1, keepdim=True)
        return d, (d * self.xhat).sum(-1)  # on a CPU three times as fast as a batched product

    def curvature(self, d, a, as_form):
        """The curvature along the tangents [n, D], or the form [n, D, D] of which that is the diagonal."""
        u = self.weight * (3 / d.shape[-1] * self.k * a - 2 * (d * self.h).sum(-1))  # [n, G, D]
        if as_form:
            weighted = (self.k * self.weight)[..., None] * d
            return u.mT @ a - weighted.transpose(1, 2).flatten(2) @ d.transpose(1, 2).flatten(2).mT
        return (u * a - self.k * self.weight * torch.linalg.vector_norm(d, dim=-1).square()).sum(1)

    def push(self, d, a):
        """The tangents [n, D, G, P] at y; overwrites d."""
        return d.addcmul_(a[..., None], self.xhat, value=-1 / d.shape[-1]).mul_(self.scale).transpose(1, 2)


#############################################
#               From node to node           #
#############################################


def entering(end, o, t):
    """Tangents in channel o of the value of `end`, as what reads it takes them: (t, channel).

    Why: a convolution of C channels that is given the only one that is not 0 makes a C-th of the multiplications.
    Other operations are given all channels.
    """
    readers = [node.module for node in end.followers]
    if all(isinstance(module, nn.Conv2d) and module.groups == 1 for module in readers):
        return t, slice(o, o + 1)
    return F.pad(t, [0, 0] * (t.dim() - 3) + [o, end.shape[0] - 1 - o]), ALL


def carry(linearised, path, source, t, channel, as_form=False):
    """Carry tangents t [n, D, c, ...] in `channel` of the value of `source` along `path`: (curvature met, tangents).

    The tangents are those of the last operation; the curvature is [n, D], or a form [n, D, D].
    """
    tangents = {source: (t, channel)}
    curvature = 0.
    for step, node in enumerate(path):
        arriving = [tangents[other] for other in node.sources if other in tangents]
        t, channel = reduce(operator.add, [t for t, _ in arriving]), arriving[0][1]
        layer = linearised[node]
        if isinstance(layer, Norm):
            norm = Norm(*(v[:, channel] for v in layer))
            d, a = norm.centred(t)
            curvature = curvature + norm.curvature(d, a, as_form)
            if node.followers:
                t = norm.push(d, a).reshape(t.shape)
        else:
            t = layer(t, channel)
        tangents[node] = (t, channel if node.keeps_channels else ALL)
        for other in set(tangents) - {node}:  # free what is not read any more
            if not set(path[step + 1:]).intersection(other.users):
                del tangents[other]
    return curvature, t


#############################################
#            The rules of each layer        #
#############################################


def has_rule(module):
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    if isinstance(module, nn.InstanceNorm2d) and module.track_running_stats:
        return False
    return type(module) in WITH_RULE


def linearise(module, x, cotangent):
    """A layer at input x: a Norm, or a function that maps tangents t [n, D, c, ...] in a channel to its output's."""
    if isinstance(module, CURVED):
        return Norm.at(module, x, cotangent)
    if isinstance(module, graph.SLOPED):
        slope = slope_at(module, x)
        return lambda t, channel: t * slope[:, None, channel]
    if isinstance(module, graph.BATCH_NORMS):
        scale = (module.running_var + module.eps).rsqrt()
        scale = per_channel(scale if module.weight is None else scale * module.weight, x)
        return lambda t, channel: t * scale[:, None, channel]
    if isinstance(module, nn.MaxPool2d):
        index = F.max_pool2d(x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
                             return_indices=True)[1]
        return lambda t, channel: picked(t, index[:, None, channel])
    if isinstance(module, nn.AvgPool2d) and halves(module, x):
        return lambda t, channel: halved(t)
    if isinstance(module, nn.Conv2d):
        return lambda t, channel: batched(F.conv2d, t, module.weight[:, channel], None, module.stride, module.padding,
                                          module.dilation, module.groups)
    if isinstance(module, nn.Linear):
        return lambda t, channel: batched(torch.matmul, t, module.weight.T)
    if isinstance(module, graph.ChannelLinear):
        return lambda t, channel: torch.einsum("oi,ndi...->ndo...", module.weight, t)
    if isinstance(module, graph.Add):  # of what arrives
        return lambda t, channel: t
    return lambda t, channel: batched(module, t)


def batched(function, t, *arguments):
    """A function of [n, ...] applied to t [n, D, ...]."""
    return function(t.flatten(0, 1), *arguments).unflatten(0, t.shape[:2])


def per_channel(v, x):
    """v [C], shaped to multiply x [N, C, ...]."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def slope_at(module, x):
    """The derivative of a function of one number."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(module(x).sum(), x)[0]


def picked(t, index):
    """The values of t [n, D, c, H, W] at the positions `index` [n, 1, c, h, w]."""
    return torch.take_along_dim(t.flatten(3), index.flatten(3), 3).unflatten(3, index.shape[3:])


def halves(module, x):
    """Does the pooling take the means of 2 x 2 pixels, of all of them?"""
    plain = module.kernel_size == module.stride == 2 and module.padding == 0 and module.divisor_override is None
    return plain and x.shape[-1] % 2 == x.shape[-2] % 2 == 0


def halved(t):
    t = t[..., ::2, :] + t[..., 1::2, :]  # eight times as fast as avg_pool2d on a CPU
    return (t[..., ::2] + t[..., 1::2]).mul_(1 / 4)


def directions(layer, values):
    """Tangents at one output channel of a layer along each of that channel's own parameters, the bias last.

    They are [n, G, D, P], at P positions; output channel o of O belongs to group o // (O / G): the shifted input
    channels of a convolution, the inputs of a linear layer, the normalised values of a norm, and ones for the bias.
    """
    module, x = layer.module, values[layer.sources[0]]
    if isinstance(module, nn.Conv2d):
        rows = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        rows = rows.unflatten(1, (module.groups, -1))
    elif isinstance(module, (nn.Linear, graph.ChannelLinear)):
        rows = x.reshape(len(x), 1, x.shape[1], -1)
    else:
        if isinstance(module, graph.BATCH_NORMS):
            x = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        else:
            x = F.group_norm(x, getattr(module, "num_groups", x.shape[1]), eps=module.eps)
        rows = x.reshape(*x.shape[:2], 1, -1)
    return torch.cat([rows, torch.ones_like(rows[:, :, :1])], 2) if bias_matters(layer) else rows


def bias_matters(layer):
    """Does the layer have a bias, and one that not only instance norms read? These remove it: derivatives of 0."""
    removed = [isinstance(user.module, CURVED) and user.keeps_channels for user in layer.users]
    return layer.module.bias is not None and not (removed and all(removed))
