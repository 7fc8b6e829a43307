"""The exact Hessian diagonal of trained tickets: Section 4.2's table and the appendix's distributions of the paper.

    python hessian.py --mask masks/r4.pt masks/r10.pt masks_real/r4.pt masks_real/r10.pt masks/r0.pt      the table
    python hessian.py --mask masks/r4.pt --method estimate       from random probes, with error bars: any network
    python hessian.py --dataset digits                           offline demonstration

Train a ticket on real data (or take stability.py's endpoint), draw one batch of training images, and get the second
derivative of the loss along every weight: convnet3 of width 128, 2.6 CPU-seconds an image (about 170 for a batch of
64), where one backward pass a weight takes a day.

The paper counts pruned weights, whose second derivative is exactly 0: means and deviations shrink with sparsity alone.
Every row is therefore printed twice, for all prunable weights and for the surviving ones.

As a library, for a network and a batch of one's own:

    diagonal = hessian.exact_diagonal(model.eval(), images, labels)
    diagonal.whole["conv1.weight"]           # second derivatives of the mean loss, in the shape of the weight
    diagonal.gauss_newton["conv1.weight"]    # their part that is never negative
"""
if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while PyTorch is imported

import math
import operator
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp

from common import cli, files, graph, ranks, tickets
from common.bars import Bar, along
from common.endpoints import check_apart, endpoint, real_recipe, result_names, train_ahead
from common.errors import UserError
from common.evaluation import mean_and_std
from common.masks import apply_mask
from common.networks import build_network
from common.streams import random_stream

FORMAT = "lottery-hessian-1"
FIGURES = ("min", "max", "mean", "std", "mean_abs", "trace", "top_eigenvalue", "gauss_newton_share")
PAPER = {("dense", 0): (-1.847, 1.344, .0048, .035, .0067), ("IMP", 60): (-3.073, 4.510, .0051, .0559, .0087),
         ("IMP", 90): (-6.323, 6.127, .0035, .0594, .0060), ("synthetic", 60): (-.982, 2.093, .0047, .0286, .0061),
         ("synthetic", 90): (-2.338, 1.730, .0037, .0354, .0053)}  # the first five figures
ALL = slice(None)  # channels

#############################################
#             The exact diagonal            #
#############################################

# Along one weight the loss L is a function of one number. With t the tangent of a value, its derivative by the weight,
#
#     d2L / dw2 = sum over operations of  <cotangent at the output, second derivative of the operation [t, t]>.
#
# Convolutions, linear layers, pooling, ReLU, additions and BatchNorm in eval mode have none: they are linear along a
# line, or piecewise so. Two kinds of term are left, and the next two sections are these:
#
#     softmax cross-entropy      t' (diag(p) - p p') t, for all weights together from one backward pass a class
#     instance and group norms   a quadratic form in t, which is carried forward from the weight to every norm after it


class Diagonal(NamedTuple):
    """The diagonal of the Hessian of the mean loss, as {parameter name: tensor}; exactly 0 at pruned weights."""

    gauss_newton: dict  # the part of the loss's own curvature
    whole: dict
    method: str


def exact_diagonal(model, images, labels, mask=None):
    """The Diagonal at images [N, C, H, W] and labels [N], of `model` in eval mode under a mask of its parameters.

    On a CPU, torch's threads work on different images. Raises UserError for an operation that has no rule below, and
    for an entry that is not finite.
    """
    nodes = operations(model, images[:2])
    kept = {node: kept_entries(node, mask or {}) for node in nodes if getattr(node.module, "weight", None) is not None}
    sums = dict.fromkeys(kept, 0.)
    few = max(1, batch_limit(images.device) // (8 * max(node.shape.numel() for node in nodes)))
    workers = torch.get_num_threads() if images.device.type == "cpu" else 1
    bar = Bar("diagonal", len(labels), unit="image")
    with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        batches = images.split(few), labels.split(few)
        for terms, done in zip(pool.map(partial(diagonal_terms, nodes, kept), *batches), batches[1]):
            sums = {layer: sums[layer] + term / len(labels) for layer, term in terms.items()}
            bar.update(len(done))
    parts = [by_name(model, {layer: both[i] for layer, both in sums.items()}) for i in (0, 1)]
    check_finite("the Hessian's diagonal", parts[1])
    curved = any(node.followers for node in nodes)
    return Diagonal(*parts, "exact (structured)" if curved else "exact (Gauss-Newton, piecewise linear)")


def batch_limit(device):
    """Numbers in a batch of tangents: few enough for a processor's cache, enough to fill a GPU."""
    return 1 << (20 if device.type == "cpu" else 26)


def diagonal_terms(nodes, kept, images, labels):
    """{layer: [2, O, D]}: the Gauss-Newton part and the whole diagonal of the summed loss, at the weights `kept`."""
    terms = {layer: torch.stack([part * kept[layer]] * 2) for layer, part in gauss_newton(nodes, kept, images).items()}
    if any(node.followers for node in nodes):
        add_norm_curvature(nodes, kept, images, labels, {layer: term[1] for layer, term in terms.items()})
    return terms


def second_derivative(model, images, labels, direction):
    """The definition, which the tests hold the rules against: d2/ds2 of the mean loss at weights + s direction, s = 0.

    `direction` is {parameter name: tensor}. Forward over reverse: through nn.InstanceNorm2d, forward over forward is
    wrong without a word, since PyTorch's forward rule, differentiated again, takes the statistics for constants.
    """
    parameters = dict(model.named_parameters())

    def loss(s):
        moved = {name: parameters[name] + s * part for name, part in direction.items()}
        return F.cross_entropy(functional_call(model, parameters | moved, (images,)), labels)

    zero = images.new_zeros(())
    return jvp(grad(loss), (zero,), (torch.ones_like(zero),))[1]


#############################################
#          The curvature of the loss        #
#############################################


def gauss_newton(nodes, layers, images):
    """The Gauss-Newton part of the diagonal of the summed loss: {layer: [O, D]}, entries as in `directions`.

    Softmax cross-entropy has the Hessian diag(p) - p p' = sum_c r_c r_c' in the logits, r_c = sqrt(p_c) (e_c - p):
    the part is the sum over classes c of squared per-image gradients of r_c . logits.
    """
    values = graph.run(nodes, images.clone().requires_grad_())  # for a gradient at every value
    logits = values[nodes[-1]]
    p = logits.detach().softmax(1)
    rows = {layer: directions(layer, values).detach() for layer in layers}
    totals = dict.fromkeys(rows, 0.)
    for c, e in enumerate(torch.eye(p.shape[1]).to(p)):
        r = p[:, c:c + 1].sqrt() * (e - p)
        cotangents = torch.autograd.grad(logits, [values[layer] for layer in rows], r, retain_graph=True)
        for (layer, row), cotangent in zip(rows.items(), cotangents):
            n, groups, _, positions = row.shape
            gradients = cotangent.reshape(n, groups, -1, positions) @ row.mT  # [n, G, O / G, D]
            totals[layer] = totals[layer] + gradients.flatten(1, 2).square_().sum(0)
    return totals


#############################################
#           The curvature of norms          #
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


def add_norm_curvature(nodes, kept, images, labels, totals):
    """Add the norms' part of the summed loss's diagonal to `totals`, at the weights `kept`, both {layer: [O, D]}."""
    values = graph.run(nodes, images.clone().requires_grad_())
    loss = F.cross_entropy(values[nodes[-1]], labels, reduction="sum")
    cotangents = dict(zip(values, torch.autograd.grad(loss, list(values.values()))))
    with torch.no_grad():
        linearised = {node: linearise(node.module, values[node.sources[0]], cotangents[node])
                      for node in nodes[1:]}
        for layer in [layer for layer in kept if layer.followers]:
            rows = directions(layer, values)
            part, total = kept[layer], totals[layer]
            for o in part.any(1).nonzero().flatten().tolist():
                t = rows[:, o * rows.shape[1] // len(part), part[o]]
                total[o, part[o]] += channel_curvature(linearised, layer, o, t).sum(0)


def channel_curvature(linearised, layer, o, t):
    """Curvature [n, D] of the norms after `layer` along tangents t [n, D, P] at channel o of its output."""
    chain = graph.channel_chain(layer)
    end = [layer, *chain][-1]
    t = t.reshape(*t.shape[:2], 1, *layer.shape[1:])
    curvature, t = carry(linearised, chain, layer, t, slice(o, o + 1))
    reached = graph.closure(end, lambda node: node.followers) - {end}
    tail = [node for node in linearised if node in reached]
    if not tail:
        return curvature
    if t.shape[1] > t[0, 0].numel():
        return curvature + curvature_by_form(linearised, tail, end, o, t)
    size = max(1, batch_limit(t.device) // max(len(t) * node.shape.numel() for node in tail))
    parts = [carry(linearised, tail, end, *entering(end, o, part))[0] for part in t.split(size, 1)]
    return curvature + torch.cat(parts, 1)


def curvature_by_form(linearised, tail, end, o, t):
    """Curvature [n, D] on the `tail` along more tangents t [n, D, 1, ...] than the R positions that they live in.

    Why: it is a quadratic form in R numbers. Carrying R unit vectors gives the form, and applying it to the tangents
    is a product of small matrices (width 128: 1,152 tangents of a channel of the second layer, in 64 positions).
    """
    rows = t.flatten(2)
    R = rows.shape[2]
    units = torch.eye(R).to(t).reshape(1, R, *t.shape[2:]).expand(len(t), *[-1] * (t.dim() - 1))
    form, _ = carry(linearised, tail, end, *entering(end, o, units), as_form=True)
    return ((rows @ form) * rows).sum(2)


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

CURVED = (nn.GroupNorm, nn.InstanceNorm2d)
WITH_RULE = (nn.Conv2d, nn.Linear, graph.ChannelLinear, *CURVED, *graph.BATCH_NORMS, *graph.SLOPED, *graph.POOLS,
             *graph.UNCHANGED, *graph.LINEAR)


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


def kept_entries(layer, mask):
    """Which of a layer's own parameters survive: bool [O, D], as in `directions`."""
    parts = ("weight", "bias") if bias_matters(layer) else ("weight",)
    parameters = {part: getattr(layer.module, part) for part in parts}
    kept = [mask.get(f"{layer.name}.{part}", torch.ones_like(p, dtype=torch.bool)) for part, p in parameters.items()]
    return torch.cat([part.reshape(len(part), -1) for part in kept], 1)


def by_name(model, matrices):
    """Matrices {layer: [O, D]} as {parameter name: tensor}; 0 for parameters that are in none."""
    tensors = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for layer, matrix in matrices.items():
        weight = tensors[f"{layer.name}.weight"]
        weight.copy_(matrix[:, :weight[0].numel()].reshape(weight.shape))
        if bias_matters(layer):
            tensors[f"{layer.name}.bias"].copy_(matrix[:, -1])
    return tensors


def operations(model, images):
    """The nodes of a network, marked where they lead to a norm with curvature.

    UserError names the first operation that the exact way has no rule for, at images [n, ...] like these.
    """
    check_eval_mode(model)
    try:
        nodes = graph.trace(model, images)
        for node in nodes:
            if not has_rule(node.module):
                raise UserError(str(node))
        if len(nodes[-1].shape) != 1:
            raise UserError(f"outputs of shape {tuple(nodes[-1].shape)} an image")
    except UserError as error:
        what = f"the exact Hessian diagonal has no rule for {error}"
        raise UserError(f"{what}; --method estimate needs none") from error
    graph.mark_leading(nodes, CURVED)
    return nodes


def check_eval_mode(model):
    """Refuse dropout, and norms with the statistics of a batch, which couple its samples. Raises UserError."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (batch_norm or isinstance(module, nn.modules.dropout._DropoutNd)):
            raise UserError(f"{type(module).__name__} {name} is in train mode; call eval()")
        if batch_norm and module.running_mean is None:
            raise UserError(f"{type(module).__name__} {name} has no running statistics; a batch's couple its samples")


#############################################
#     Any network: products and probes      #
#############################################


class Hessian:
    """Products with the Hessian of the mean loss over all parameters, laid end to end; rows of pruned weights are 0.

    They are sums over the images, of which each rank has its part.
    """

    def __init__(self, model, images, labels, mask):
        check_eval_mode(model)
        self.parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}  # frozen ones too
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.n, self.own = len(labels), own_images()
        self.logits = functional_call(model, self.parameters, (images[self.own],))
        loss = F.cross_entropy(self.logits, labels[self.own], reduction="sum") / self.n
        self.gradients = self.grad(loss, create_graph=True)
        kept = [mask.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in self.parameters.items()]
        self.kept = flat(kept)
        self.prunable = flat([torch.full_like(part, name in mask) for name, part in zip(self.parameters, kept)])
        self.chosen = (self.kept & self.prunable).nonzero().flatten()  # the surviving prunable weights

    def grad(self, *outputs, **options):
        return torch.autograd.grad(*outputs, list(self.parameters.values()), allow_unused=True,
                                   materialize_grads=True, **options)

    def product(self, v):
        product = ranks.sum_over_ranks_(self.own_product(v))
        parts = zip(self.parameters.items(), product.split(self.sizes))
        check_finite("a product with the Hessian", {name: part.view_as(p) for (name, p), part in parts})
        return product

    def own_product(self, v):
        parts = (v * self.kept).split(self.sizes)
        inner = sum((g * part.view_as(g)).sum() for g, part in zip(self.gradients, parts))
        return flat(self.grad(inner, retain_graph=True)) * self.kept

    def entry(self, i):
        """One diagonal entry of this rank's images, by one product: the way of the paper's code."""
        v = torch.zeros_like(self.kept, dtype=self.logits.dtype)
        v[i] = 1
        return self.own_product(v)[i]

    def signs(self, generator, shape=None):
        return torch.randint(2, shape or self.kept.shape, generator=generator).to(self.logits).mul_(2).sub_(1)

    def probe(self, generator):
        """v * Hv for random signs v, the diagonal plus noise (Hutchinson), and the Gauss-Newton trace plus noise."""
        p = self.logits.detach().softmax(1)
        r = p.sqrt() * self.signs(generator, (self.n, p.shape[1]))[self.own]
        root = self.grad(self.logits, grad_outputs=r - p * r.sum(1, keepdim=True), retain_graph=True)
        root = ranks.sum_over_ranks_(flat(root) * self.kept)
        v = self.signs(generator)
        return v * self.product(v), root.square().sum() / self.n

    def top_eigenvalue(self, generator, steps=100, tolerance=.001):
        """(largest eigenvalue, error bar) by Lanczos: an eigenvalue lies within the error bar, the residual's norm.

        The vectors are not kept and not orthogonalised again: eigenvalues repeat, but the largest stays in its place.
        """
        start = torch.randn(len(self.kept), generator=generator).to(self.logits) * self.kept
        q, previous = start / start.norm(), torch.zeros_like(start)
        alphas, betas = [], [0.]
        for _ in range(steps):
            r = self.product(q) - betas[-1] * previous
            alphas.append(float(q @ r))
            r -= alphas[-1] * q
            betas.append(float(r.norm()))
            off = torch.tensor(betas[1:-1], dtype=torch.float64)
            T = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
            values, vectors = torch.linalg.eigh(T)
            error = betas[-1] * abs(float(vectors[-1, -1]))
            if error <= tolerance * abs(float(values[-1])):
                break
            previous, q = q, r / betas[-1]
        return float(values[-1]), error


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def own_images():
    """The part of a batch's images that this rank has."""
    return slice(ranks.current().rank, None, ranks.current().size)


def jackknife(left_out):
    """Standard errors from statistics [..., m] that leave out one of m samples each."""
    m = left_out.shape[-1]
    return ((m - 1) * left_out.var(-1, correction=0)).sqrt()


def trace_figures(traces, loss_traces):
    """The trace, and the Gauss-Newton share of it, from probes [m] of both."""
    left_out = [part.sum() - part for part in (traces, loss_traces)]
    return {"trace": (traces.mean(), traces.std() / len(traces) ** .5),
            "gauss_newton_share": (loss_traces.sum() / traces.sum(), jackknife(left_out[1] / left_out[0]))}


def probe_figures(D, total):
    """Mean and standard deviation over `total` weights with error bars, from m probes D [m, surviving weights].

    Two probes have independent noise: of the m x m products between probes only those of different ones are used
    (a U-statistic), else the noise would count as spread.
    """
    m, means = len(D), D.double().sum(1) / total
    between = (D @ D.T).double() / total - means[:, None] * means
    rows = between.sum(1) - between.diag()
    std = (rows.sum() / (m * (m - 1))).clamp(min=0).sqrt()
    left_out = ((rows.sum() - 2 * rows) / ((m - 1) * (m - 2))).clamp(min=0).sqrt()
    return {"mean": (means.mean(), means.std() / m ** .5), "std": (std, jackknife(left_out))}


def entry_figures(entries, weights, total):
    """The first five figures over `total` weights, of which `weights` survive, from entries of all or some of these.

    Of some: min and max are theirs, mean |h| has their sampling error; mean and deviation are better left to probes.
    """
    n, share = len(entries), weights / total
    powers = torch.stack([entries, entries.square(), entries.abs()]).double()
    sums = powers.sum(1)
    mean, square, mean_abs = share * sums / n
    error = 0.
    if n < weights:
        left_out = share * (sums[:, None] - powers) / (n - 1)
        error = jackknife(left_out)[2] * (1 - n / weights) ** .5
    with_pruned = entries if weights == total else F.pad(entries, (0, 1))  # the pruned ones are 0
    std = (square - mean * mean).clamp(min=0).sqrt()
    values = with_pruned.min(), with_pruned.max(), mean, std, mean_abs
    return dict(zip(FIGURES, zip(values, (0., 0., 0., 0., error))))


#############################################
#              The experiment               #
#############################################


def measure_exact(model, images, labels, mask, generator):
    """({scope: {figure: (value, error bar)}}, diagonals, method) of one batch; scopes are "all" and "surviving".

    Raises UserError.
    """
    hessian = Hessian(model, images, labels, mask)
    top = hessian.top_eigenvalue(generator)
    own = labels[own_images()]
    *parts, method = exact_diagonal(model, images[own_images()], own, mask)
    for part in parts:
        for h in part.values():
            ranks.sum_over_ranks_(h.mul_(len(own) / len(labels)))
    loss_part, diagonal = parts
    loss_trace, trace = (sum(float(h.double().sum()) for h in part.values()) for part in parts)
    share = loss_trace / trace if trace else math.nan
    shared = {"top_eigenvalue": top, "trace": (trace, 0.), "gauss_newton_share": (share, 0.)}
    entries = torch.cat([diagonal[name][kept] for name, kept in mask.items()])
    figures = {scope: shared | entry_figures(entries, len(entries), total) for scope, total in totals(mask).items()}
    return figures, {"diagonal": diagonal, "gauss_newton": loss_part}, method


def measure_estimate(model, images, labels, mask, weights, probes, generator):
    """As measure_exact, from `probes` random vectors and exact entries of `weights` random weights; no diagonals."""
    hessian = Hessian(model, images, labels, mask)
    top = hessian.top_eigenvalue(generator)
    D, loss_traces = map(torch.stack, zip(*(hessian.probe(generator) for _ in along(range(probes), "probes"))))
    shared = {"top_eigenvalue": top} | trace_figures(D.sum(1).double(), loss_traces.double())
    survivors = len(hessian.chosen)
    sample = hessian.chosen[torch.randperm(survivors, generator=generator)[:weights].to(images.device)]
    entries = ranks.sum_over_ranks_(torch.stack([hessian.entry(i) for i in along(sample, "weights")]))
    figures = {}
    for scope, total in totals(mask).items():
        of_sample = entry_figures(entries, survivors, total)
        figures[scope] = shared | of_sample | probe_figures(D[:, hessian.chosen], total)
    method = f"estimate: {probes} probes; min, max, mean |h| of {len(entries)} exact entries"
    if len(entries) < survivors:  # (1 - fraction beyond) ** n = 5%
        method += f" (95% sure: at most {1 - .05 ** (1 / len(entries)):.1%} of weights beyond min or max)"
    return figures, {}, method


def totals(mask):
    """How many weights a row of the table is of."""
    return {"all": sum(kept.numel() for kept in mask.values()), "surviving": sum(int(m.sum()) for m in mask.values())}


def check_finite(what, tensors):
    """Raises UserError that names the first entry of {name: tensor} that is NaN or infinite."""
    for name, h in tensors.items():
        broken = (~h.isfinite()).nonzero()
        if len(broken):
            index = tuple(broken[0].tolist())
            raise UserError(f"{what} is {float(h[index])} at {name}{list(index)}")


def analyse(path, name, ticket, train, settings, args):
    """The result of one ticket, from --out when it is there already, else computed and saved."""
    file = result_file(args.out, name)
    if ranks.broadcast(file.exists()):
        earlier = files.load(file)
        if not isinstance(earlier, dict) or earlier.get("format") != FORMAT:
            raise UserError(f"{file} is in the result's place, but is none; choose another --out")
        if not files.difference(earlier["settings"], settings, ignored=("sparse",)):
            return earlier | {"settings": settings}
    model = trained_network(path, name, ticket, train, args)
    order = torch.randperm(len(train), generator=random_stream(settings["batch_seed"], "hessian batches"))
    measured = []
    for number, index in enumerate(order[:args.batch * args.batches].split(args.batch)):
        images, labels = train.batch(index)
        batch = model, images.to(getattr(torch, args.dtype)), labels, ticket["masks"]
        generator = random_stream(settings["batch_seed"], "hessian", number)
        if args.method == "exact":
            measured.append(measure_exact(*batch, generator))
        else:
            measured.append(measure_estimate(*batch, args.weights, args.probes, generator))
    figures, diagonals, methods = zip(*measured)
    result = {"format": FORMAT, "settings": settings, "method": methods[-1],
              "scopes": {scope: over_batches([batch[scope] for batch in figures]) for scope in figures[0]},
              **{key: ticket[key] for key in ("sparsity", "config", "masks")}}
    for part, first in diagonals[0].items():
        result[part] = {name: sum(batch[part][name] for batch in diagonals) / len(diagonals) for name in first}
    files.save(file, result)
    return result


def result_file(out, name):
    return Path(out, f"{name}_hessian.pt")


def recipe_of_ticket(args, ticket):
    """The Recipe of a ticket's training on real data, as the flags say."""
    return real_recipe(ticket["config"], args.epochs, args.lr, args.batch_size)


def trained_network(path, name, ticket, train, args):
    """The ticket's endpoint of the first data order as a network in eval mode. Raises UserError."""
    trained = endpoint(args.endpoints, name, ticket, train, 0, recipe_of_ticket(args, ticket), args.seed,
                       overwrite=args.overwrite)
    model = build_network(ticket["config"]).to(train.labels.device)
    model.load_state_dict(trained["state"])
    apply_mask(model, ticket["masks"])
    check_finite(f"{path}: the trained network", dict(model.named_parameters()))
    return model.to(getattr(torch, args.dtype)).eval()


def over_batches(figures):
    """{figure: [mean, standard deviation, error bar of the mean]} over batches of {figure: (value, error bar)}."""
    joined = {}
    for name in FIGURES:
        values, errors = zip(*((float(value), float(error)) for value, error in (batch[name] for batch in figures)))
        joined[name] = [*mean_and_std(values), math.hypot(*errors) / len(figures)]
    return joined


#############################################
#                  Results                  #
#############################################


def named(results):
    """Results {path: result} with their "family": what differs between them, the seed apart, is in its name."""
    names = tickets.family_names([result["config"] for result in results.values()])
    return {path: result | {"family": name if result["sparsity"] else "dense"}
            for (path, result), name in zip(results.items(), names)}


def paper_figures(result):
    """The paper's row for this ticket, or None when network, data or sparsity are others."""
    config, percent = result["config"], 100 * result["sparsity"]
    same = (config["model"], config["dataset"], config.get("norm") or "instance", config.get("width") or 128,
            config.get("train_images")) == ("convnet3", "cifar10", "instance", 128, None)
    level = min((0, 60, 90), key=lambda level: abs(level - percent))
    return PAPER.get((result["family"].split(",")[0], level)) if same and abs(level - percent) < 2 else None


def print_table(results):
    print_row("subnetwork", "sparsity", "weights",
              ("min / max", "mean +- std", "mean |h|", "trace", "top eigenvalue", "GN share"))
    for result in results:
        exact = result["settings"]["method"] == "exact"
        for scope, figures in result["scopes"].items():
            means, spreads, errors = ({name: f[i] for name, f in figures.items()} for i in range(3))
            print_row(result["family"], f"{result['sparsity']:.1%}", scope, cells(means))
            if not exact:
                print_row("  error bar", "", "", cells({name: errors[name] for name in FIGURES[2:]}))
            if result["settings"]["batches"] > 1:
                print_row("  std over batches", "", "", cells(spreads))
            if scope == "all" and paper_figures(result):
                print_row("  paper", "", "", cells(dict(zip(FIGURES, paper_figures(result)))))
        ending = f"; top eigenvalue +- {errors['top_eigenvalue']:.1g}" if exact else ""
        print(f"  {result['method']}{ending}")


def cells(figures):
    """The columns of a row, empty where a figure is missing."""
    low, high, mean, std, *rest = (f"{figures[name]:.3g}" if name in figures else "" for name in FIGURES)
    return f"{low} / {high}" if low else "", f"{mean} +- {std}", *rest


def print_row(label, sparsity, scope, cells):
    widths = 18, 20, 9, 8, 14, 8
    print(f"{label:<24} {sparsity:>8} {scope:>9}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


def table_rows(results):
    """A row for each ticket and scope, for hessian.csv."""
    rows = []
    for path, result in results.items():
        for scope, figures in result["scopes"].items():
            row = {"mask": path, "family": result["family"], "sparsity": result["sparsity"],
                   "method": result["method"], "scope": scope, **result["settings"]}
            for name, (mean, spread, error) in figures.items():
                row |= {name: mean, f"{name}_std": spread, f"{name}_error": error}
            rows.append(row)
    return rows


def draw_histograms(results, path):
    """Distributions over surviving weights, common bins, a panel for each sparsity with the families overlaid."""
    from matplotlib.figure import Figure

    values = [torch.cat([result["diagonal"][name][kept] for name, kept in result["masks"].items()]).float().cpu()
              for result in results]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    levels = sorted({round(100 * result["sparsity"]) for result in results} - {0}) or [0]
    figure = Figure(figsize=(5.5 * len(levels), 4), layout="constrained")
    for axes, level in zip(figure.subplots(1, len(levels), sharey=True, squeeze=False)[0], levels):
        for result, h in zip(results, values):
            if round(100 * result["sparsity"]) in (0, level):
                counts, edges = torch.histogram(h, 120, range=(low, high))
                axes.stairs(counts, edges, label=f"{result['family']}, {result['sparsity']:.0%} sparse")
        axes.set_yscale("log")
        axes.set_xlabel("second derivative of the loss along a weight")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("surviving weights")
    files.save(path, figure)


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = cli.Parser(__doc__)
    cli.ticket_flags(parser)
    flag = parser.add_argument_group("Hessian diagonal").add_argument
    flag("--batch", type=cli.positive, default=64, help="training images in a batch (64)")
    flag("--batches", type=cli.positive, default=1, help="batches: means, and their spread (1)")
    flag("--method", choices=("exact", "estimate"), default="exact", help="estimate: any network, error bars (exact)")
    flag("--weights", type=cli.at_least(2), metavar="N", help="estimate: random weights with exact entries (200)")
    flag("--probes", type=cli.at_least(3), default=64, help="estimate: random vectors (64)")
    flag("--dtype", choices=("float32", "float64"), default="float32", help="(float32)")
    flag("--endpoints", type=cli.folder, default=Path("runs/stability"), metavar="DIR",
         help="endpoints of stability.py, trained when missing (runs/stability)")
    flag("--overwrite", action="store_true", help="replace endpoints of other settings")
    flag("--out", type=cli.folder, default=Path("runs/hessian"), metavar="DIR",
         help="table, picture, diagonals (runs/hessian)")
    args = parser.parse_args(argv)
    if args.method == "estimate":
        args.weights = args.weights or 200
    return args


def settings_of(args, ticket, train):
    """All that a result depends on; a result with equal settings is not computed again."""
    config = ticket["config"]
    return {"mask_sha": tickets.fingerprint(ticket), "images": len(train),
            "seed": config["seed"] if args.seed is None else args.seed, "batch_seed": args.seed or 0,
            "data_fingerprint": config.get("data_fingerprint"), **recipe_of_ticket(args, ticket)._asdict(),
            **{key: getattr(args, key) for key in ("batch", "batches", "method", "weights", "probes", "dtype")}}


def check_before_training(args, ticket_at, train):
    """Refuse before the training what cannot be measured after it. Raises UserError."""
    if args.batch * args.batches > len(train):
        raise UserError(f"--batch {args.batch} x --batches {args.batches}: more than the {len(train)} training images")
    if args.batch < ranks.current().size:
        raise UserError(f"--batch {args.batch}: fewer images than the {ranks.current().size} ranks")
    for path, ticket in ticket_at.items():
        if totals(ticket["masks"])["surviving"] == 0:
            raise UserError(f"{path}: no prunable weight survives, and so there is no Hessian diagonal to show")
    model = build_network(next(iter(ticket_at.values()))["config"]).to(train.labels.device).eval()
    check_network(model, train.batch(slice(2))[0], args.method)


def check_network(model, images, method):
    """Raises UserError unless the network has logits of the images [n, C, H, W], and rules for the exact method."""
    check_eval_mode(model)
    try:
        with torch.no_grad():
            logits = model(images.clone())  # which it may overwrite
    except RuntimeError as error:
        raise UserError(f"the network does not take the dataset's images ({graph.first_line(error)})") from error
    if not torch.is_tensor(logits) or logits.dim() != 2:
        raise UserError("the network returns something else than logits of images and classes")
    if method == "exact":
        operations(model, images)


def main():
    args = parse()
    ticket_at, train, _ = tickets.load_tickets(args.mask, args, cli.start(args))
    check_before_training(args, ticket_at, train)
    names = result_names(ticket_at)
    for name in names.values():
        check_apart(result_file(args.out, name), ticket_at)
    with files.owned(args.out):
        experiment(args, ticket_at, names, train)


def experiment(args, ticket_at, names, train):
    """Analyse every ticket, print and draw what was found."""
    train_ahead(args.endpoints, ticket_at, train, 1, partial(recipe_of_ticket, args), args.seed,
                overwrite=args.overwrite)
    results = {path: analyse(path, names[path], ticket, train, settings_of(args, ticket, train), args)
               for path, ticket in ticket_at.items()}
    if not ranks.is_first():
        return
    results = named(results)
    print_table(results.values())
    files.save_csv(args.out / "hessian.csv", table_rows(results))
    if args.method == "exact":
        draw_histograms(list(results.values()), args.out / "hessian.png")
    written = "hessian.csv, diagonals and hessian.png" if args.method == "exact" else "hessian.csv"
    print(f"written: {written} in {args.out}")


if __name__ == "__main__":
    cli.run(main)
