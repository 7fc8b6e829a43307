"""The exact Hessian diagonal of trained subnetworks: Section 4.2's table and the appendix's distributions of the paper.

    python hessian.py --mask masks/r4.pt masks/r10.pt masks_real/r4.pt masks_real/r10.pt masks/r0.pt      the table
    python hessian.py --mask masks/r4.pt --method brute --weights 200        one Hessian product a weight, as a check
    python hessian.py --dataset digits                                       offline demonstration

Train a subnetwork on real data (or take stability.py's end point), draw one batch of training images, and get the
second derivative of the loss along every weight: convnet3 of width 128, 2.6 CPU-seconds an image (about 170 for a
batch of 64), where one backward pass a weight takes a day. How: for loss L and the tangents x' that a unit step of
weight i causes,

    H_ii = sum over operations of <cotangent at the output, second derivative of the operation [x', x']>,

and only softmax cross-entropy (its part is the exact Gauss-Newton diagonal: as many backward passes as classes) and
instance or group norm have one. With BatchNorm in eval mode, or no norm, the Gauss-Newton diagonal is all.

The paper counts pruned weights, whose second derivative is exactly 0: means and deviations shrink with sparsity alone.
Every row is therefore printed twice, for all prunable weights and for the surviving ones.
"""
import math
import operator
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from tqdm import tqdm

import common
import ranks
import tickets
from common import UserError, mean_and_std, random_stream

FORMAT = "lottery-hessian-1"
FIGURES = ("min", "max", "mean", "std", "mean_abs", "trace", "top_eigenvalue", "gauss_newton_share")
PAPER = {("dense", 0): (-1.847, 1.344, .0048, .035, .0067), ("IMP", 60): (-3.073, 4.510, .0051, .0559, .0087),
         ("IMP", 90): (-6.323, 6.127, .0035, .0594, .0060), ("synthetic", 60): (-.982, 2.093, .0047, .0286, .0061),
         ("synthetic", 90): (-2.338, 1.730, .0037, .0354, .0053)}  # the first five figures

#############################################
#         The network taken apart           #
#############################################


class Add(nn.Module):
    """A residual connection."""

    def forward(self, x, y):
        return x + y


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CURVED = (nn.GroupNorm, nn.InstanceNorm2d)
PLAIN = (nn.ReLU, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Identity, nn.Dropout, Add)
FUNCTIONS = {operator.add: Add(), torch.add: Add(), F.relu: nn.ReLU(), torch.flatten: nn.Flatten()}
ALL = slice(None)  # channels


def has_rule(module):
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.InstanceNorm2d):
        return not module.track_running_stats
    return isinstance(module, PLAIN + BATCH_NORMS + (nn.GroupNorm, nn.Linear, nn.Flatten))


def is_channelwise(module):
    """Does a change in one channel stay in that channel?"""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == module.num_channels
    return isinstance(module, PLAIN + BATCH_NORMS + (nn.InstanceNorm2d,))


class Network:
    """A model as a graph of modules, and the nodes `leading` to the curvature of a norm.

    UserError names the first operation that the exact way has no rule for.
    """

    def __init__(self, model):
        try:
            nodes = list(fx.symbolic_trace(model).graph.nodes)
        except Exception as error:  # a forward that is handed a tracer may raise anything
            raise UserError(f"the network cannot be traced ({error}); --method estimate needs no trace") from error
        self.images, self.modules, self.leading = nodes[0], {}, set()  # modules {node: module} in order of execution
        for node in nodes[1:-1]:
            module = model.get_submodule(node.target) if node.op == "call_module" else FUNCTIONS.get(node.target)
            twice = module in self.modules.values() and bool(list(module.parameters()))
            if not has_rule(module) or twice or len(node.all_input_nodes) != 1 + isinstance(module, Add):
                what = f"{module} in {node.target}" if node.op == "call_module" else f"the operation {node.target}"
                raise UserError(f"the exact Hessian diagonal has no rule for {what}{' used twice' * twice}; "
                                "--method estimate needs none")
            # An in-place ReLU would overwrite a value that is needed.
            self.modules[node] = nn.ReLU() if isinstance(module, nn.ReLU) else module
        for node in reversed(nodes):
            if isinstance(self.modules.get(node), CURVED) or self.followers(node):
                self.leading.add(node)
        self.layers = [node for node, module in self.modules.items() if getattr(module, "weight", None) is not None]

    def forward(self, images):
        """{node: value}, the logits [N, K] last. The images require a gradient, to have one at every value."""
        values = {self.images: images.clone().requires_grad_()}
        for node, module in self.modules.items():
            values[node] = module(*(values[source] for source in node.all_input_nodes))
        return values

    def followers(self, node):
        """The nodes that read this one's value and lead to the curvature of a norm."""
        return [user for user in node.users if user in self.leading]

    def chain(self, node):
        """The nodes after this one through which a tangent in one channel stays in that channel."""
        path = [node]
        while len(after := self.followers(path[-1])) == 1 and is_channelwise(self.modules[after[0]]):
            path += after
        return path[1:]

    def tail(self, node):
        """All nodes between this one and the last curved norm after it."""
        reached, path = {node}, []
        for other in self.modules:
            if other in self.leading and reached.intersection(other.all_input_nodes):
                reached.add(other)
                path.append(other)
        return path

    def has_bias(self, node):
        """Does the layer have a bias that matters? One that only instance norms read has derivatives of exactly 0."""
        after = [self.modules.get(user) for user in node.users]
        removed = all(isinstance(module, CURVED) and is_channelwise(module) for module in after)
        return self.modules[node].bias is not None and not removed


def directions(module, x, bias):
    """Tangents at one output channel along each of that channel's own parameters, the bias last.

    Input x [n, C, ...] -> [n, G, D, P]: P positions; output channel o of O belongs to group o // (O / G). They are the
    shifted input channels of a convolution, the inputs of a linear layer, the normalised values of a norm, and ones.
    """
    if isinstance(module, nn.Conv2d):
        rows = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        rows = rows.unflatten(1, (module.groups, -1))
    elif isinstance(module, nn.Linear):
        rows = x[:, None, :, None]
    else:
        if isinstance(module, BATCH_NORMS):
            x = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        else:
            x = F.group_norm(x, getattr(module, "num_groups", x.shape[1]), eps=module.eps)
        rows = x.reshape(*x.shape[:2], 1, -1)
    return torch.cat([rows, torch.ones_like(rows[:, :, :1])], 2) if bias else rows


#############################################
#       Exact: the curvature of the loss    #
#############################################


def gauss_newton(network, images):
    """The Gauss-Newton part of the diagonal of the summed loss: {layer: [O, D]}, entries as in `directions`.

    Softmax cross-entropy has the Hessian diag(p) - p p^T = sum_c r_c r_c^T in the logits, r_c = sqrt(p_c) (e_c - p):
    the part is the sum over classes c of squared per-image gradients of r_c . logits.
    """
    values = network.forward(images)
    logits = list(values.values())[-1]
    p = logits.detach().softmax(1)
    rows = {node: directions(network.modules[node], values[node.all_input_nodes[0]].detach(), network.has_bias(node))
            for node in network.layers}
    totals = dict.fromkeys(rows, 0.)
    for c, e in enumerate(torch.eye(p.shape[1]).to(p)):
        cotangents = torch.autograd.grad(logits, [values[node] for node in rows], p[:, c:c + 1].sqrt() * (e - p),
                                         retain_graph=True)
        for (node, row), cotangent in zip(rows.items(), cotangents):
            n, groups, _, positions = row.shape
            gradients = cotangent.reshape(n, groups, -1, positions) @ row.mT  # [n, G, O / G, D]
            totals[node] = totals[node] + gradients.flatten(1, 2).square_().sum(0)
    return totals


#############################################
#       Exact: the curvature of norms       #
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

    def push(self, t, channel, gram, onward):
        """(curvature, tangents at y) of tangents t [n, D, c, ...] at z that live in `channel`; see `walk`."""
        xhat, h, k, weight, scale = (v[:, channel] for v in self)
        d = t.reshape(*t.shape[:2], xhat.shape[1], -1).transpose(1, 2)  # [n, G, D, P]
        positions = d.shape[-1]
        d = d - d.mean(-1, keepdim=True)
        a, b = (d * xhat).sum(-1), (d * h).sum(-1)  # on a CPU three times as fast as a batched product with 2 columns
        u = weight * (3 / positions * k * a - 2 * b)  # [n, G, D]
        if gram:
            weighted = (k * weight)[..., None] * d
            curvature = u.mT @ a - weighted.transpose(1, 2).flatten(2) @ d.transpose(1, 2).flatten(2).mT
        else:
            curvature = (u * a - k * weight * torch.linalg.vector_norm(d, dim=-1).square()).sum(1)
        if onward:
            t = d.addcmul_(a[..., None], xhat, value=-1 / positions).mul_(scale).transpose(1, 2).reshape(t.shape)
        return curvature, t


def per_channel(v, x):
    """v [C], shaped to multiply x [N, C, ...]."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def halves(module, t):
    return module.kernel_size == module.stride == 2 and not module.padding and not (t.shape[-1] | t.shape[-2]) & 1


def observe(module, x, y, cotangent):
    """What a layer's tangents depend on at these images."""
    if isinstance(module, CURVED):
        return Norm.at(module, x, cotangent)
    if isinstance(module, nn.ReLU):
        return (y > 0).to(y.dtype)
    if isinstance(module, BATCH_NORMS):
        scale = (module.running_var + module.eps).rsqrt()
        return per_channel(scale if module.weight is None else scale * module.weight, x)
    if isinstance(module, nn.MaxPool2d):
        return F.max_pool2d(x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
                            return_indices=True)[1]


def push(module, seen, t, channel):
    """Tangents t [n, D, c, ...] in `channel` of the input of a layer without curvature, at its output."""
    if isinstance(module, (nn.Identity, nn.Dropout, Add)):
        return t
    if isinstance(module, (nn.ReLU, *BATCH_NORMS)):
        return t * seen[:, None, channel]
    if isinstance(module, nn.MaxPool2d):
        index = seen[:, None, channel].expand(-1, t.shape[1], *[-1] * 3)
        return t.flatten(3).gather(3, index.flatten(3)).view_as(index)
    if isinstance(module, nn.AvgPool2d) and halves(module, t):
        t = t[..., ::2, :] + t[..., 1::2, :]  # eight times as fast as avg_pool2d on a CPU
        return (t[..., ::2] + t[..., 1::2]).mul_(1 / 4)
    flat = t.flatten(0, 1)
    if isinstance(module, nn.Conv2d):
        flat = F.conv2d(flat, module.weight[:, channel], None, module.stride, module.padding, module.dilation,
                        module.groups)
    elif isinstance(module, nn.Linear):
        flat = flat @ module.weight.T
    else:
        flat = module(flat)
    return flat.unflatten(0, t.shape[:2])


def walk(network, seen, path, source, t, channel, gram=False):
    """Push tangents t in `channel` of the value of `source` along `path`: (curvature met, tangents at the end).

    The curvature is [n, D]; with `gram` it is the form [n, D, D] whose diagonal that is.
    """
    tangents, curvature = {source: (t, channel)}, 0.
    for step, node in enumerate(path):
        module = network.modules[node]
        arriving = [tangents[other] for other in node.all_input_nodes if other in tangents]
        t, channel = reduce(operator.add, [t for t, _ in arriving]), arriving[0][1]
        if isinstance(module, CURVED):
            bend, t = seen[node].push(t, channel, gram, network.followers(node))
            curvature = curvature + bend
        else:
            t = push(module, seen[node], t, channel)
        tangents[node] = t, channel if is_channelwise(module) else ALL
        for other in set(tangents) - {node}:  # free what is not read any more
            if not set(path[step + 1:]).intersection(other.users):
                del tangents[other]
    return curvature, t


def batch_limit(device):
    """Numbers in a batch of tangents: few enough for a processor's cache, enough to fill a GPU."""
    return 1 << (20 if device.type == "cpu" else 26)


def channel_curvature(network, values, seen, layer, o, t):
    """Curvature [n, D] of the norms after `layer` along tangents t [n, D, P] at channel o of its output.

    After that channel's own norm and pooling, the D tangents lie in a space of R dimensions, its positions. With D > R
    the rest of the network is walked with the R unit vectors, and the form they give is applied to all D.
    """
    chain, channel = network.chain(layer), slice(o, o + 1)
    t = t.reshape(*t.shape[:2], 1, *values[layer].shape[2:])
    curvature, t = walk(network, seen, chain, layer, t, channel)
    end = ([layer] + chain)[-1]
    tail = network.tail(end)
    if not tail:
        return curvature
    shape, rows = t.shape[3:], t.flatten(2)
    R = rows.shape[2]
    small = t.shape[1] > R
    if small:
        t = torch.eye(R).to(t).reshape(1, R, 1, *shape).expand(len(t), *[-1] * (2 + len(shape)))
    narrow = all(isinstance(m, nn.Conv2d) and m.groups == 1 for m in map(network.modules.get, network.followers(end)))
    if not narrow:  # these layers are given all channels
        t = F.pad(t, [0, 0] * len(shape) + [o, values[end].shape[1] - 1 - o])
        channel = ALL
    if small:
        form, _ = walk(network, seen, tail, end, t, channel, gram=True)
        return curvature + ((rows @ form) * rows).sum(2)
    size = max(1, batch_limit(t.device) // max(values[node].numel() for node in tail))
    return curvature + torch.cat([walk(network, seen, tail, end, part, channel)[0] for part in t.split(size, 1)], 1)


def add_norm_curvature(network, images, labels, kept, totals):
    """Add the norms' part of the summed loss's diagonal to `totals`, at the weights `kept`, both {layer: [O, D]}."""
    values = network.forward(images)
    loss = F.cross_entropy(list(values.values())[-1], labels, reduction="sum")
    cotangents = dict(zip(values, torch.autograd.grad(loss, list(values.values()))))
    with torch.no_grad():
        seen = {node: observe(module, values[node.all_input_nodes[0]], values[node], cotangents[node])
                for node, module in network.modules.items()}
        for layer in filter(network.followers, network.layers):
            rows = directions(network.modules[layer], values[layer.all_input_nodes[0]], network.has_bias(layer))
            part, total = kept[layer], totals[layer]
            for o in part.any(1).nonzero().flatten().tolist():
                t = rows[:, o * rows.shape[1] // len(part), part[o]]
                total[o, part[o]] += channel_curvature(network, values, seen, layer, o, t).sum(0)


def diagonal_terms(network, kept, images, labels):
    """{layer: [2, O, D]}: the Gauss-Newton part and the whole diagonal of the summed loss."""
    terms = {layer: torch.stack([part * kept[layer]] * 2) for layer, part in gauss_newton(network, images).items()}
    if network.leading:
        add_norm_curvature(network, images, labels, kept, {layer: term[1] for layer, term in terms.items()})
    return terms


def exact_diagonal(model, images, labels, mask, progress=None):
    """(Gauss-Newton part, diagonal, method) of the Hessian of the mean loss, both {name: tensor} of all parameters.

    Pruned weights are exactly 0. `model` is in eval mode. On a CPU, torch's threads work on different images;
    `progress(n)` is called after every n images. Raises UserError.
    """
    network = Network(model)
    kept = {layer: surviving(network, layer, mask) for layer in network.layers}
    sums = {layer: torch.zeros(2, *part.shape).to(images) for layer, part in kept.items()}
    largest = max(value.numel() for value in network.forward(images[:1]).values())
    few = max(1, batch_limit(images.device) // (8 * largest))
    workers = torch.get_num_threads() if images.device.type == "cpu" else 1
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        batches = images.split(few), labels.split(few)
        for terms, done in zip(pool.map(partial(diagonal_terms, network, kept), *batches), batches[1]):
            for layer, term in terms.items():
                sums[layer] += term / len(labels)
            if progress:
                progress(len(done))
    method = "exact (structured)" if network.leading else "exact (Gauss-Newton, piecewise linear)"
    return *(named(model, network, {layer: both[i] for layer, both in sums.items()}) for i in (0, 1)), method


def surviving(network, layer, mask):
    """Which of a layer's own parameters survive: bool [O, D]."""
    weight = network.modules[layer].weight
    kept = mask.get(f"{layer.target}.weight", torch.ones_like(weight, dtype=torch.bool)).reshape(len(weight), -1)
    return torch.cat([kept, torch.ones_like(kept[:, :1])], 1) if network.has_bias(layer) else kept


def named(model, network, matrices):
    """Matrices {layer: [O, D]} as {parameter name: tensor}; 0 for parameters that are in none."""
    tensors = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for layer, matrix in matrices.items():
        weight = tensors[f"{layer.target}.weight"]
        weight.copy_(matrix[:, :weight[0].numel()].reshape(weight.shape))
        if network.has_bias(layer):
            tensors[f"{layer.target}.bias"].copy_(matrix[:, -1])
    return tensors


#############################################
#     Any network: products and probes      #
#############################################


class Hessian:
    """Products with the Hessian of the mean loss over all parameters, laid end to end; rows of pruned weights are 0.

    They are sums over the images, of which each rank has its part.
    """

    def __init__(self, model, images, labels, mask):
        names, self.parameters = zip(*model.named_parameters())
        self.n, self.own = len(labels), own_images()
        self.logits = model(images[self.own])
        loss = F.cross_entropy(self.logits, labels[self.own], reduction="sum") / self.n
        self.gradients = self.grad(loss, create_graph=True)
        every = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
        self.kept = torch.cat([kept.flatten() for kept in (every | mask).values()])
        self.prunable = torch.cat([torch.full_like(p, name in mask).flatten() for name, p in every.items()])
        self.chosen = (self.kept & self.prunable).nonzero().flatten()  # the surviving prunable weights

    def grad(self, *outputs, **options):
        return torch.autograd.grad(*outputs, self.parameters, allow_unused=True, materialize_grads=True, **options)

    def product(self, v):
        return ranks.sum_over_ranks_(self.own_product(v))

    def own_product(self, v):
        parts = (v * self.kept).split([p.numel() for p in self.parameters])
        inner = sum((g * part.view_as(g)).sum() for g, part in zip(self.gradients, parts))
        return torch.cat([g.flatten() for g in self.grad(inner, retain_graph=True)]) * self.kept

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
        root = torch.cat([g.flatten() for g in self.grad(self.logits, grad_outputs=r - p * r.sum(1, keepdim=True),
                                                         retain_graph=True)])
        root = ranks.sum_over_ranks_(root * self.kept)
        v = self.signs(generator)
        return v * self.product(v), root.square().sum() / self.n


def own_images():
    """The part of a batch's images that this rank has."""
    rank, count, *_ = ranks.together.get()
    return slice(rank, None, count)


def top_eigenvalue(product, start, steps=100, tolerance=.001):
    """(largest eigenvalue, error bar) by Lanczos: an eigenvalue lies within the error bar, the norm of the residual.

    The vectors are not kept and not orthogonalised again, which repeats eigenvalues but leaves the largest in place.
    """
    q, previous, alphas, betas = start / start.norm(), torch.zeros_like(start), [], [0.]
    for _ in range(steps):
        r = product(q) - betas[-1] * previous
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


def jackknife(left_out):
    """Standard errors from statistics [..., m] that leave out one of m samples each."""
    m = left_out.shape[-1]
    return ((m - 1) * left_out.var(-1, correction=0)).sqrt()


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


def sample_figures(entries, weights, total):
    """All five figures over `total` weights, of which `weights` survive, from entries of a random sample of these.

    min and max are the sample's; the others have the sampling error as error bar.
    """
    n, share = len(entries), weights / total
    powers = torch.stack([entries, entries.square(), entries.abs()]).double()
    sums = powers.sum(1, keepdim=True)

    def statistics(sums, n):
        mean, square, mean_abs = share * sums / n
        return torch.stack([mean, (square - mean * mean).clamp(min=0).sqrt(), mean_abs])

    errors = jackknife(statistics(sums - powers, n - 1)) * (1 - n / weights) ** .5
    extremes = torch.cat([entries, entries.new_zeros(int(weights < total))])  # the pruned ones are 0
    values = [extremes.min(), extremes.max(), *statistics(sums, n)[:, 0]]
    return dict(zip(FIGURES, zip(values, (0., 0., *errors))))


#############################################
#              The experiment               #
#############################################


def measure(model, images, labels, mask, method, weights, probes, generator):
    """({scope: {figure: (value, error bar)}}, diagonals, method) at one batch; scopes are "all" and "surviving".

    `method` is exact, estimate or brute; the last two take `weights` random weights exactly (None: all surviving) and
    `probes` random vectors, and give no diagonals. Raises UserError.
    """
    check_batchnorm(model)
    hessian = Hessian(model, images, labels, mask)
    bar = partial(tqdm, disable=None, leave=False)
    start = torch.randn(len(hessian.kept), generator=generator).to(hessian.logits) * hessian.kept
    shared = {"top_eigenvalue": top_eigenvalue(hessian.product, start)}
    if method == "exact":
        own = labels[own_images()]
        with bar(total=len(own), desc="diagonal", unit="image") as images_done:
            *parts, label = exact_diagonal(model, images[own_images()], own, mask, images_done.update)
        loss_part, diagonal = ({name: ranks.sum_over_ranks_(h * (len(own) / len(labels))) for name, h in part.items()}
                               for part in parts)
        trace, loss_trace = (sum(float(h.double().sum()) for h in part.values()) for part in (diagonal, loss_part))
        shared |= {"trace": (trace, 0.), "gauss_newton_share": (loss_trace / trace, 0.)}
        entries = torch.cat([diagonal[name][kept] for name, kept in mask.items()])
        diagonals = {"diagonal": diagonal, "gauss_newton": loss_part}
    else:
        noisy = [hessian.probe(generator) for _ in bar(range(probes), desc="probes")]
        D, loss_traces = (torch.stack(part) for part in zip(*noisy))
        shared |= trace_figures(D.sum(1).double(), loss_traces.double())
        order = torch.randperm(len(hessian.chosen), generator=generator)[:weights]
        entries = torch.stack([hessian.entry(i) for i in bar(hessian.chosen[order.to(images.device)], desc="weights")])
        entries = ranks.sum_over_ranks_(entries)
        sample = f"{len(entries)} exact entries"
        if len(entries) < len(hessian.chosen):  # (1 - fraction beyond) ** n = 5%
            sample += f" (95% sure: at most {1 - .05 ** (1 / len(entries)):.1%} of weights beyond min or max)"
        label = {"estimate": f"estimate: {probes} probes; min, max, mean |h| of {sample}",
                 "brute": f"brute: {sample}; trace, GN share of {probes} probes"}[method]
        diagonals = {}
    figures = {}
    for scope, total in ("all", int(hessian.prunable.sum())), ("surviving", len(hessian.chosen)):
        figures[scope] = shared | sample_figures(entries, len(hessian.chosen), total)
        if method == "estimate":
            figures[scope] |= probe_figures(D[:, hessian.chosen], total)
    return figures, diagonals, label


def trace_figures(traces, loss_traces):
    """The trace, and the Gauss-Newton share of it, from probes [m] of both."""
    left_out = [part.sum() - part for part in (traces, loss_traces)]
    return {"trace": (traces.mean(), traces.std() / len(traces) ** .5),
            "gauss_newton_share": (loss_traces.sum() / traces.sum(), jackknife(left_out[1] / left_out[0]))}


def check_batchnorm(model):
    """Refuse BatchNorm with the batch's statistics: it couples samples. Raises UserError."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise UserError(f"BatchNorm {name} is in train mode: statistics of the batch couple its samples; "
                            "call eval(), with running statistics")


def analyse(path, subnetwork, train, settings, args):
    """The result of one mask, from --out when it is there already, else computed and saved."""
    file = tickets.result_path(args.out, path, ".pt")
    if ranks.first_says(file.exists()) and (earlier := common.load(file)).get("settings") == settings:
        return earlier
    masks, dtype, seed = subnetwork["masks"], getattr(torch, args.dtype), settings["batch_seed"]
    trained = tickets.endpoint(args.endpoints, path, subnetwork, train, 0, args.epochs, args.seed,
                               overwrite=args.overwrite)
    model = common.build_network(subnetwork["config"]).to(train.labels.device)
    model.load_state_dict(trained["state"])
    common.apply_mask(model, masks)
    model = model.to(dtype).eval()
    broken = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
    if broken:
        raise UserError(f"{path}: {broken} of the trained network holds NaN or infinity")
    order = torch.randperm(len(train), generator=random_stream(seed, "hessian batches"))
    figures, diagonals = [], []
    for number, index in enumerate(order[:args.batch * args.batches].split(args.batch)):
        images, labels = train.batch(index)
        measured = measure(model, images.to(dtype), labels, masks, args.method, args.weights, args.probes,
                           random_stream(seed, "hessian", number))
        figures.append(measured[0])
        diagonals.append(measured[1])
    result = {"format": FORMAT, "settings": settings, "method": measured[2], "sparsity": subnetwork["sparsity"],
              "config": subnetwork["config"], "masks": masks,
              "scopes": {scope: over_batches([batch[scope] for batch in figures]) for scope in ("all", "surviving")}}
    for part in diagonals[0]:
        result[part] = {name: sum(d[part][name] for d in diagonals) / len(diagonals) for name in diagonals[0][part]}
    common.save(file, result)
    return result


def over_batches(figures):
    """{figure: [mean, standard deviation, error bar of the mean]} over batches of {figure: (value, error bar)}."""
    return {name: [*mean_and_std([float(f[name][0]) for f in figures]),
                   math.hypot(*(float(f[name][1]) for f in figures)) / len(figures)] for name in FIGURES}


#############################################
#                  Results                  #
#############################################


def label_of(result):
    return "dense" if result["sparsity"] == 0 else tickets.family(result["config"])


def paper_figures(result):
    """The paper's row for this subnetwork, or None when network, data or sparsity are others."""
    config = result["config"]
    same = (config["model"], config["dataset"], config.get("norm") or "instance", config.get("width") or 128,
            config.get("train_images")) == ("convnet3", "cifar10", "instance", 128, None)
    key = label_of(result).split(",")[0], min((0, 60, 90), key=lambda level: abs(level - 100 * result["sparsity"]))
    return PAPER.get(key) if same and abs(key[1] - 100 * result["sparsity"]) < 2 else None


def print_table(results):
    print_row("subnetwork", "sparsity", "weights",
              ("min / max", "mean +- std", "mean |h|", "trace", "top eigenvalue", "GN share"))
    for result in results:
        exact, several = result["settings"]["method"] == "exact", result["settings"]["batches"] > 1
        for scope, figures in result["scopes"].items():
            means, spreads, errors = ({name: f[i] for name, f in figures.items()} for i in range(3))
            print_row(label_of(result), f"{result['sparsity']:.1%}", scope, cells(means))
            if not exact:
                print_row("  error bar", "", "", cells(errors))
            if several:
                print_row("  std over batches", "", "", cells(spreads))
            if scope == "all" and paper_figures(result):
                print_row("  paper", "", "", cells(dict(zip(FIGURES, paper_figures(result)))))
        print(f"  {result['method']}" + f"; top eigenvalue +- {errors['top_eigenvalue']:.1g}" * exact)


def cells(figures):
    low, high, mean, std, *rest = (f"{figures[name]:.3g}" if figures.get(name) else "" for name in FIGURES)
    return f"{low} / {high}" * bool(low and high), f"{mean} +- {std}" * bool(mean and std), *rest


def print_row(label, sparsity, scope, cells):
    widths = 18, 20, 9, 8, 14, 8
    print(f"{label:<24} {sparsity:>8} {scope:>9}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


def table_rows(results):
    """A row for each mask and scope, for hessian.csv."""
    return [{"mask": path, "family": label_of(result), "sparsity": result["sparsity"], "method": result["method"],
             "scope": scope, **result["settings"]}
            | {name + ending: value for name, figure in figures.items()
               for ending, value in zip(("", "_std", "_error"), figure)}
            for path, result in results.items() for scope, figures in result["scopes"].items()]


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
                axes.stairs(counts, edges, label=f"{label_of(result)}, {result['sparsity']:.0%} sparse")
        axes.set_yscale("log")
        axes.set_xlabel("second derivative of the loss along a weight")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("surviving weights")
    common.save(path, figure)


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = common.Parser(__doc__)
    tickets.subnetwork_flags(parser)
    group = parser.add_argument_group("Hessian diagonal")
    group.add_argument("--batch", type=common.positive, default=64, help="training images in a batch (64)")
    group.add_argument("--batches", type=common.positive, default=1, help="batches: means, and their spread (1)")
    group.add_argument("--method", choices=("exact", "estimate", "brute"), default="exact",
                       help="exact; estimate: any network, with error bars; brute: a Hessian product a weight (exact)")
    group.add_argument("--weights", type=common.at_least(2), metavar="N",
                       help="random weights with exact entries (estimate: 200, brute: all)")
    group.add_argument("--probes", type=common.at_least(3), default=64, help="random vectors of the estimates (64)")
    group.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(float32)")
    group.add_argument("--endpoints", type=common.folder, default=Path("runs/stability"), metavar="DIR",
                       help="trained subnetworks of stability.py, made when missing (runs/stability)")
    group.add_argument("--overwrite", action="store_true", help="replace end points of other settings")
    group.add_argument("--out", type=common.folder, default=Path("runs/hessian"), metavar="DIR",
                       help="table, picture, diagonals (runs/hessian)")
    args = parser.parse_args(argv)
    args.weights = args.weights or (200 if args.method == "estimate" else None)
    return args


def settings_of(args, subnetwork, train):
    """All that a result depends on; a result with equal settings is not computed again."""
    config = subnetwork["config"]
    return {"mask_sha": tickets.fingerprint(subnetwork), "images": len(train),
            "seed": config["seed"] if args.seed is None else args.seed, "batch_seed": args.seed or 0,
            **common.recipe_of(config, args.epochs or config["eval_epochs"])._asdict(),
            **{key: getattr(args, key) for key in ("batch", "batches", "method", "weights", "probes", "dtype")}}


def main():
    args = parse()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    subnetworks, train, _ = tickets.load_subnetworks(args.mask, args)
    if args.batch * args.batches > len(train):
        raise UserError(f"--batch {args.batch} x --batches {args.batches}: more than the {len(train)} training images")
    if args.batch < ranks.together.get().size:
        raise UserError(f"--batch {args.batch}: fewer images than the {ranks.together.get().size} ranks")
    model = common.build_network(next(iter(subnetworks.values()))["config"]).eval()
    check_batchnorm(model)
    if args.method == "exact":
        Network(model)  # refuses before the training, not after it
    tickets.train_ahead(args.endpoints, subnetworks, train, 1, args.epochs, args.seed, overwrite=args.overwrite)
    results = {path: analyse(path, subnetwork, train, settings_of(args, subnetwork, train), args)
               for path, subnetwork in subnetworks.items()}
    if ranks.together.get().rank:
        return
    print_table(results.values())
    common.save_csv(args.out / "hessian.csv", table_rows(results))
    if args.method == "exact":
        draw_histograms(list(results.values()), args.out / "hessian.png")
    print(f"written: hessian.csv{', diagonals and hessian.png' * (args.method == 'exact')} in {args.out}")


if __name__ == "__main__":
    common.run(main)
