"""Random small networks for the exact Hessian: every entry exact, or the network refused, never wrong.

    python tests/random_networks.py 0 1000        by hand, seeds 0 to 999; a few of them are in test_hessian.py

The networks are programs of steps on the values before them: convolutions of all kinds, norms, pooling of odd sizes,
activations that are shared, functions, methods or in place, sums with factors and broadcasting, reshapes, heads.
"""
import random
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hessian  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.masks import apply_mask  # noqa: E402
from common.networks import prunable  # noqa: E402


class RandomNetwork(nn.Module):
    """The network of a seed, in float64 and eval mode; `shape` is that of its images."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.shape = 3, self.random.choice([6, 7, 8]), self.random.choice([5, 6, 8])
        self.layers = nn.ModuleList()
        self.shared = nn.ReLU(inplace=self.random.random() < .5)
        self.steps = []
        values = [torch.randn(2, *self.shape, dtype=torch.float64)]
        self.take(self.convolution(values[-1]), values)
        for _ in range(self.random.randint(3, 8)):
            kinds = [self.convolution, self.norm, self.activation, self.pool, self.sum, self.other]
            step = self.random.choices(kinds, [3, 3, 3, 2, 3, 1])[0]
            self.take(step(values[-1], values) if step == self.sum else step(values[-1]), values)
        self.take(self.features(values[-1]), values)
        self.take(self.logits(values[-1]), values)

    def forward(self, x):
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return values[-1]

    def take(self, step, values):
        """Add the step to the program, if it works on these values."""
        copies = [value.clone() for value in values]
        try:
            with torch.no_grad():
                copies.append(step(copies))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return
        if copies[-1].numel():
            self.steps.append(step)
            values[:] = copies

    def layer(self, module):
        """A step that applies `module`, with nothing left at a special value."""
        module = module.double().eval()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if isinstance(module, (nn.Conv2d, nn.Linear)) or name == "num_batches_tracked":
                continue
            nn.init.uniform_(tensor, .5, 1.5) if name in ("weight", "running_var") else nn.init.normal_(tensor, 0, .3)
        self.layers.append(module)
        return lambda values: module(values[-1])

    def convolution(self, x):
        pick, channels = self.random.choice, x.shape[1]
        groups = pick([g for g in range(1, channels + 1) if channels % g == 0])
        out = groups * min(pick([1, 2, 3]), 8 // groups)
        conv = nn.Conv2d(channels, out, pick([1, 2, 3, (1, 3), (3, 2)]), pick([1, 1, 2, (1, 2)]),
                         pick([0, 1, 2, (1, 0)]), pick([1, 1, 2]), groups, pick([True, False]))
        self.layer(conv)
        return pick([lambda values: conv(values[-1]), lambda values: conv(input=values[-1])])

    def norm(self, x):
        channels = x.shape[1]
        groups = self.random.choice([g for g in range(1, channels + 1) if channels % g == 0])
        return self.layer(self.random.choice([
            nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels, affine=False),
            nn.GroupNorm(channels, channels), nn.InstanceNorm2d(channels), nn.InstanceNorm2d(channels, affine=True),
            nn.BatchNorm2d(channels), nn.BatchNorm1d(channels)]))

    def activation(self, x):
        inplace = self.random.choice([True, False])
        return self.random.choice([
            lambda values: self.shared(values[-1]), self.layer(nn.ReLU(inplace)), self.layer(nn.ReLU6(inplace)),
            self.layer(nn.LeakyReLU(.2, inplace)), self.layer(nn.Hardtanh(-1., 2., inplace)),
            lambda values: F.relu(values[-1], inplace=inplace), lambda values: F.relu6(values[-1], inplace),
            lambda values: F.leaky_relu(values[-1], negative_slope=.3), lambda values: torch.relu(values[-1]),
            lambda values: values[-1].relu(), lambda values: values[-1].relu_()])

    def pool(self, x):
        pick = self.random.choice
        size, stride, padding = pick([2, 3, (1, 2), (2, 3)]), pick([None, 1, 2, (2, 1)]), pick([0, 0, 1, (0, 1)])
        up, counted, out = pick([True, False]), pick([True, False]), pick([1, 2, (1, 2), (None, 2)])
        return pick([
            self.layer(nn.AvgPool2d(2)), self.layer(nn.AvgPool2d(2, divisor_override=3)),
            self.layer(nn.AvgPool2d(size, stride, padding, up, counted)), self.layer(nn.AdaptiveAvgPool2d(out)),
            self.layer(nn.MaxPool2d(size, stride, padding, pick([1, 2]), ceil_mode=up)),
            lambda values: F.avg_pool2d(values[-1], size, stride, padding, up, counted),
            lambda values: F.max_pool2d(values[-1], size, stride, padding, 1, up),
            lambda values: F.max_pool2d(values[-1], kernel_size=size, ceil_mode=up),
            lambda values: F.adaptive_avg_pool2d(values[-1], out)])

    def sum(self, x, values):
        """x and an earlier value y, or as much of y as broadcasts to x."""
        j, alpha = self.random.randrange(len(values)), self.random.choice([.3, -1.5, 2])
        fit = self.random.choice([lambda y: y.mean((2, 3), keepdim=True), lambda y: F.adaptive_avg_pool2d(y, 1),
                                  lambda y: y.mean([1], True).mean((-2, -1), keepdim=True)])
        if values[j].shape == x.shape:
            def fit(y):
                return y

        def plus_equals(values):
            out = values[-1]
            out += fit(values[j])
            return out

        return self.random.choice([
            lambda values: values[-1] + fit(values[j]), lambda values: fit(values[j]) + values[-1], plus_equals,
            lambda values: torch.add(values[-1], fit(values[j]), alpha=alpha),
            lambda values: torch.add(fit(values[j]), values[-1], alpha=alpha),
            lambda values: torch.add(input=values[-1], other=fit(values[j])),
            lambda values: values[-1].add(fit(values[j]), alpha=alpha),
            lambda values: values[-1].add_(fit(values[j]), alpha=alpha)])

    def other(self, x):
        conv = nn.Conv2d(x.shape[1], x.shape[1], 1)
        self.layer(conv)

        def overwrites_a_view(values):
            values[-1].flatten(1).relu_()
            return values[-1].add(values[-1])

        def overwrites_an_earlier_value(values):
            values[1].relu_()
            return torch.relu(values[-1])

        return self.random.choice([
            self.layer(nn.Identity()), self.layer(nn.Dropout(.3)), self.layer(nn.Dropout2d(.3)),
            lambda values: F.dropout(values[-1], .2, self.training), lambda values: values[-1][:, 1:],
            lambda values: values[-1][:, :, 1:, :4], lambda values: values[-1] + values[-1],
            self.layer(nn.Linear(x.shape[-1], 4)), self.layer(nn.Linear(x.shape[-1], 4, bias=False)),
            overwrites_a_view, overwrites_an_earlier_value, lambda values: conv(conv(values[-1])),
            lambda values: values[-1] * 2, lambda values: torch.cat([values[-1], values[-1]], 1), self.layer(nn.SiLU()),
            self.layer(nn.InstanceNorm2d(x.shape[1], track_running_stats=True)),
            self.layer(nn.Conv2d(x.shape[1], 3, 3, padding="same"))])

    def features(self, x):
        size = x[0].numel()
        flat = [self.layer(nn.Flatten()), lambda values: values[-1].flatten(1),
                lambda values: torch.flatten(values[-1], start_dim=1),
                lambda values: values[-1].reshape(values[-1].size(0), -1),
                lambda values: values[-1].reshape(values[-1].shape[0], -1),
                lambda values: values[-1].reshape(-1, size), lambda values: values[-1].mean((2, 3)),
                lambda values: values[-1].mean([-2, -1])]
        rows = self.layer(nn.Linear(x.shape[2] * x.shape[3], 4))  # on three axes
        norm = self.layer(nn.GroupNorm(1, x.shape[1]))
        flat.append(lambda values: torch.relu(norm([rows([torch.flatten(values[-1], 2)])])).mean(2))
        return self.random.choice(flat)

    def logits(self, x):
        wide, narrow, unused = nn.Linear(x.shape[1], 4), nn.Linear(x.shape[1], 3), nn.Linear(x.shape[1], 2)
        for module in (wide, narrow, unused):
            self.layer(module)

        def with_auxiliary_head(values):
            unused(values[-1])
            return narrow(values[-1])

        return self.random.choice([with_auxiliary_head, lambda values: wide(values[-1])[:, :3]])


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


def outcome(seed, entries=4):
    """ "exact" or "refused", of the network of a seed; an AssertionError where an entry is wrong.

    Of each parameter, some entries are held against the definition. "untrainable": autograd refuses the network, for
    an operation in place.
    """
    model = RandomNetwork(seed)
    images, labels = torch.randn(3, *model.shape, dtype=torch.float64), torch.tensor([0, 1, 2])
    mask = {name: torch.rand(weight.shape) < .8 for name, weight in prunable(model).items()}
    apply_mask(model, mask)
    try:
        F.cross_entropy(model(images), labels).backward()
    except RuntimeError:
        return "untrainable"
    try:
        whole = hessian.exact_diagonal(model, images, labels, mask).whole
    except UserError as error:
        assert "the exact Hessian diagonal has no rule for" in str(error) and "\n" not in str(error)
        return "refused"
    largest = max(float(h.abs().max()) for h in whole.values())
    chosen = [(name, i) for name, h in whole.items() for i in torch.randperm(h.numel())[:entries].tolist()]
    units = {name: torch.zeros(len(chosen), *h.shape, dtype=h.dtype) for name, h in whole.items()}
    for row, (name, i) in enumerate(chosen):
        units[name][row].view(-1)[i] = mask.get(name, torch.ones_like(whole[name])).flatten()[i]
    truth = torch.vmap(lambda unit: second_derivative(model, images, labels, unit))(units)
    for (name, i), derivative in zip(chosen, truth):
        assert abs(whole[name].flatten()[i] - derivative) <= 1e-8 * max(largest, 1e-3), (seed, name, i)
    return "exact"


if __name__ == "__main__":
    print(Counter(outcome(seed) for seed in range(int(sys.argv[1]), int(sys.argv[2]))))
