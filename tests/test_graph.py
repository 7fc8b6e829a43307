"""common/graph.py: a traced network against the network itself, and what it must refuse by name."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import graph
from common.errors import UserError

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A forward of three 1x1 convolutions a, b, c of 4 channels and whatever else a case needs."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.relu, self.number = nn.ReLU(inplace=True), nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x, flag=False):
        return self.function(self, x)


def read_after_in_place(net, x):
    x = net.a(x)
    y = net.b(net.relu(x))
    return x + y  # x as ReLU left it


def plus_equals_seen_through_another_name(net, x):
    x = net.a(x)
    before = x
    x += net.b(x)
    return torch.add(before, x, alpha=.5)


def dropped_in_place(net, x):
    x = net.a(x)
    net.relu(x)
    return net.b(x)


def unused_head(net, x):
    x = net.a(x)
    net.c(x * 2)
    return x


def sizes(net, x):
    return net.a(x).view(x.size(0), -1).reshape(x.shape[0], 4, 36).flatten(1)


@pytest.mark.parametrize("function", [
    read_after_in_place, plus_equals_seen_through_another_name, dropped_in_place, unused_head, sizes,
    lambda net, x: F.max_pool2d(net.a(input=x), 3, 2, 1, 1, True),
    lambda net, x: F.avg_pool2d(net.a(x), kernel_size=2, ceil_mode=True, count_include_pad=False),
    lambda net, x: net.a(x).mean((-2, -1), keepdim=True) + F.leaky_relu(net.b(x), .3)])
def test_the_nodes_compute_what_the_network_does(function):
    net = Network(function)
    nodes = graph.trace(net, IMAGES)
    found = graph.run(nodes, IMAGES)[nodes[-1]]
    assert torch.equal(found, net(IMAGES.clone()))
    assert all(isinstance(node.module, (nn.Conv2d, *graph.UNCHANGED, *graph.SLOPED, *graph.POOLS, *graph.LINEAR))
               for node in nodes)


def overwritten_view(net, x):
    x = net.a(x)
    x.flatten(1).relu_()
    return net.b(x)


@pytest.mark.parametrize("function, name", [
    (lambda net, x: torch.sigmoid(net.a(x)), "sigmoid"),
    (lambda net, x: net.a(x).clamp(min=0), "clamp"),
    (lambda net, x: net.a(x) + 1, "arguments of add"),
    (lambda net, x: net.a(x) * net.number, "number"),
    (lambda net, x: F.relu(net.a(x)).mean(), "arguments of the operation mean"),
    (lambda net, x: net.a(x).mean((0, 2)), "Mean.* on 4 axes"),
    (lambda net, x: torch.flatten(net.a(x)), "Flatten.* on 4 axes"),
    (lambda net, x: net.a(x)[:1], "arguments of the operation getitem"),
    (lambda net, x: net.a(x).view(4, -1), "arguments of the operation view"),
    (lambda net, x: net.a(x)[:, :, :2, :4] + net.b(x)[:, :, 0, 0], "add of 4 and 2 axes"),
    (lambda net, x: torch.chunk(net.a(x), 2, 1)[0], "chunk"),
    (lambda net, x: net.a(net.a(x)), "Conv2d.* in a used twice"),
    (lambda net, x: (net.a(x), x), "not one tensor"),
    (lambda net, x: net.a(x) if x.sum() > 0 else x, "cannot trace"),
    (lambda net, x: F.dropout(net.a(x)), "operation dropout .it draws at random"),
    (overwritten_view, "relu_, which overwrites")])
def test_what_has_no_module_is_named(function, name):
    with pytest.raises(UserError, match=name):
        graph.trace(Network(function), IMAGES)


def test_hooks_and_tied_weights_are_named():
    hooked, tied = (Network(lambda net, x: net.b(net.a(x))) for _ in range(2))
    hooked.b.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UserError, match="hooks of b"):
        graph.trace(hooked, IMAGES)
    tied.b.weight = tied.a.weight
    with pytest.raises(UserError, match="Conv2d.* in b with a weight of a"):
        graph.trace(tied, IMAGES)


class Remembers(Network):
    """A network whose forward changes what it holds: in place, by another tensor, behind autograd's back."""

    def __init__(self, function):
        super().__init__(function)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(()), persistent=False)


def averages(net, x):
    x = net.a(x)
    net.seen.mul_(.9).add_(x.mean((0, 2, 3)), alpha=.1)
    return net.b(x)


def counts(net, x):
    net.calls = net.calls + 1
    return net.b(net.a(x))


def decays(net, x):
    net.a.weight.data.mul_(.5)
    return net.a(x)


def draws(net, x):
    return net.a(x) + torch.rand(1)


@pytest.mark.parametrize("function", [averages, counts, decays, draws])
def test_a_network_and_the_generators_are_left_as_they_were(function):
    net = Remembers(function)
    held = {name: (value, value.detach().clone()) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    torch.manual_seed(3)
    try:
        graph.trace(net, IMAGES)
    except UserError:  # refused or not
        pass
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        assert value is held[name][0] and torch.equal(value, held[name][1]), name
