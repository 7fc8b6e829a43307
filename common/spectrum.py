"""The Hessian of any network: its products with vectors, its largest eigenvalue, the density of all of them.

    product = spectrum.Hessian(model.eval(), images, labels, mask)
    density, error = product.spectrum(probes=8, steps=80).density(eigenvalues)
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import ranks
from .bars import along
from .errors import UserError
from .networks import named_failures
from .streams import random_stream

#############################################
#                  Products                 #
#############################################


class Hessian:
    """Products with the Hessian of the mean loss over all parameters, laid end to end; rows of pruned weights are 0.

    Of `model` in eval mode at images [n, ...] and labels [n]; the weights outside `mask` are pruned, and 0 already.
    The products are sums over the images, of which each rank has its part. Raises UserError where images are coupled.
    """

    def __init__(self, model, images, labels, mask=None):
        check_eval_mode(model)
        mask = mask or {}
        self.parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}  # frozen ones too
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.n, self.own = len(labels), ranks.own_part()
        with named_failures(images), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
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

    def spectrum(self, generator=None, probes=8, steps=80):
        """The Spectrum of the Hessian without the rows and columns of pruned weights, from `probes` random signs."""
        generator = generator or random_stream(0, "spectrum")
        kept = self.kept.nonzero().flatten()

        def product(v):
            return self.product(v.new_zeros(len(self.kept)).index_copy_(0, kept, v))[kept]

        steps = min(steps, len(kept))
        starts = (self.signs(generator)[kept] for _ in along(range(probes), "spectrum"))
        values, weights = zip(*(lanczos(product, start, steps) for start in starts))
        return Spectrum(torch.stack(values), torch.stack(weights), len(kept))


#############################################
#           The density of eigenvalues      #
#############################################


class Spectrum(NamedTuple):
    """What stochastic Lanczos quadrature knows of n eigenvalues (Ghorbani et al. 2019; PyHessian, Yao et al. 2020).

    The mean of a function f of them is, on average over random probes, that of sum_k weights_k f(values_k), which a
    probe v has for v' f(H) v / n; exactly for polynomials of degree 2 k - 1.
    """

    values: torch.Tensor  # [..., probes, k], Ritz values, float64
    weights: torch.Tensor  # [..., probes, k], of sum 1 for every probe
    n: int

    def width(self):
        """The standard deviation of the Gaussians that stand for eigenvalues: 1/300 of the range of these."""
        return float(self.values.max() - self.values.min()) / 300 or 1e-9

    def of_one(self, width):
        """The density at one eigenvalue that is alone."""
        return 1 / (self.n * width * math.sqrt(2 * math.pi))

    def density(self, eigenvalues, width=None):
        """(density [G], its standard error [G]) at `eigenvalues` [G], in Gaussians of standard deviation `width`.

        The error is that of the mean over probes; of several batches' spectra, [batches, probes, k], over batches.
        """
        width = width or self.width()
        distances = (eigenvalues.double().view(-1, *[1] * self.values.dim()) - self.values) / width
        bells = (-distances.square() / 2).exp() / (width * math.sqrt(2 * math.pi))
        samples = (self.weights * bells).sum(-1)  # [G, ..., probes]
        if samples.dim() > 2:
            samples = samples.mean(-1) if samples.shape[1] > 1 else samples[:, 0]
        return samples.mean(-1), samples.std(-1) / samples.shape[-1] ** .5


def lanczos(product, start, steps):
    """(values [k], weights [k]) of the quadrature for start' f(A) start / start' start, float64, k = steps.

    `product(v)` is A v of a symmetric A. All vectors are kept, and each new one is made orthogonal to them, twice:
    else eigenvalues found already would be found again. Where they span all that `start` reaches, weights are 0.
    """
    basis = start.new_zeros(steps, len(start))
    diagonal, beside = start.new_zeros(steps), start.new_zeros(steps)
    r, length = start, start.norm()
    for k in range(steps):
        basis[k] = r / length
        r = product(basis[k])
        diagonal[k] = basis[k] @ r
        for _ in range(2):
            r = r - basis[:k + 1].T @ (basis[:k + 1] @ r)
        length = beside[k] = r.norm()
        if length <= torch.finfo(r.dtype).eps * diagonal.abs().max():
            break
    T = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
    values, vectors = torch.linalg.eigh(T.double())
    return values, vectors[0].square()


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def check_eval_mode(model):
    """Refuse dropout, and norms with the statistics of a batch, which couple its samples. Raises UserError."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (batch_norm or isinstance(module, nn.modules.dropout._DropoutNd)):
            raise UserError(f"{type(module).__name__} {name} is in train mode; call eval()")
        if batch_norm and module.running_mean is None:
            raise UserError(f"{type(module).__name__} {name} has no running statistics; a batch's couple its samples")


def check_finite(what, tensors):
    """Raises UserError that names the first entry of {name: tensor} that is NaN or infinite."""
    for name, h in tensors.items():
        broken = (~h.isfinite()).nonzero()
        if len(broken):
            index = tuple(broken[0].tolist())
            raise UserError(f"{what} is {float(h[index])} at {name}{list(index)}")
