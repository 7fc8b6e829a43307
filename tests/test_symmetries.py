"""common/symmetries.py: relabelled networks are the same function in float64, and matching finds the labels again."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import matching, symmetries
from common.errors import UserError
from common.networks import ConvNet3, ResNet, blocks_of
from common.streams import random_stream

SHAPE = 3, 8, 8


class Own(nn.Module):
    """A forward of named layers, as a user writes it."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.program = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.program(self, x)


def conv(i, o, **options):
    return nn.Conv2d(i, o, 3, padding=1, **options)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.GELU(), nn.Dropout(.3), nn.Linear(12, 9),
                         nn.BatchNorm1d(9), nn.LeakyReLU(.1), nn.Linear(9, 7), nn.LayerNorm(7), nn.Tanh(),
                         nn.Linear(7, 4))


def flattened():
    return nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), conv(6, 5), nn.InstanceNorm2d(5),
                         nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, 8), nn.ReLU(),
                         nn.Linear(8, 4))


def residual():
    def forward(net, x):
        x = F.relu(net.norm(net.stem(x)))
        x = x + net.second(F.relu(net.first(x)))
        x = F.relu(x) + F.adaptive_avg_pool2d(net.wide(x), 1)  # broadcast
        return net.head(x.mean((2, 3)))

    return Own(forward, stem=conv(3, 6), norm=nn.GroupNorm(1, 6), first=conv(6, 5), second=conv(5, 6), wide=conv(6, 6),
               head=nn.Linear(6, 4))


def depthwise():
    return nn.Sequential(conv(3, 6), nn.ReLU6(), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.SiLU(),
                         conv(6, 12, groups=6), nn.ReLU(), nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(20, 4))


def concatenated():
    def forward(net, x):
        x = F.relu(net.a(x))
        x = torch.cat([x, F.relu(net.b(x))], 1)
        x = torch.cat([net.norm(x), net.c(x)], dim=1)
        return net.head(x.mean((-2, -1)))

    return Own(forward, a=conv(3, 4), b=conv(4, 5), norm=nn.BatchNorm2d(9), c=conv(9, 3), head=nn.Linear(12, 4))


def mixer():
    """Linear layers on three axes, along the pixels of each channel, with a residual sum."""
    def forward(net, x):
        x = net.tokens(net.embed(x).flatten(2))
        return net.head((F.gelu(x) + net.norm(net.channels(F.relu(x)))).mean(2))

    return Own(forward, embed=conv(3, 6), tokens=nn.Linear(64, 5), channels=nn.Linear(5, 5), norm=nn.LayerNorm(5),
               head=nn.Linear(6, 4))


OWN = [mlp, flattened, residual, depthwise, concatenated, mixer]


def drawn(make, seed=0):
    """A network in float64 and eval mode, with nothing left at a special value; and images."""
    torch.manual_seed(seed)
    model = make().double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(.5, 1.5)
    return model, torch.randn(6, *SHAPE, dtype=torch.float64)


def relabelled(state, groups):
    for k, group in enumerate(groups):
        state = symmetries.permute(state, group, torch.randperm(group.size, generator=random_stream(k, "labels")))
    return state


@pytest.mark.parametrize("make", OWN)
def test_relabelled_networks_are_the_same_function_and_are_matched_again(make):
    model, images = drawn(make)
    a, wanted = {name: value.clone() for name, value in model.state_dict().items()}, model(images)
    groups = symmetries.permutation_groups(model, images)
    b = relabelled(a, groups)
    assert sum(not torch.equal(b[name], value) for name, value in a.items()) >= 3
    model.load_state_dict(b)
    torch.testing.assert_close(model(images), wanted, rtol=1e-12, atol=1e-12)
    found = matching.match_weights(a, b, groups, random_stream(0))
    assert all(torch.equal(found[name], value) for name, value in a.items())


@pytest.mark.parametrize("make, sizes", [
    (mlp, [12, 9, 7]), (flattened, [6, 5, 8]), (residual, [5, 6]), (depthwise, [6, 5]), (concatenated, [4, 5, 3]),
    (mixer, [5, 6])])
def test_all_units_are_found(make, sizes):
    model, images = drawn(make)
    assert [group.size for group in symmetries.permutation_groups(model, images)] == sizes


def groups_of_the_papers_networks(model):
    """Lists of (tensor name, axis), as convnet3 and the ResNets are built, in the order that matching draws from."""
    state = model.state_dict()

    def made_by(layer):
        parts = ("weight", "bias", "running_mean", "running_var")
        names = [f"{module}.{part}" for module in (layer.conv, layer.norm) for part in parts]
        return [(name, 0) for name in names if name in state]

    def read_by(layer):
        return [(f"{layer.conv}.weight", 1)]

    groups, stream = [], []
    for block in blocks_of(model):
        for layer, reader in zip(block.layers, block.layers[1:]):
            groups.append(made_by(layer) + read_by(reader))
        stream = stream + read_by(block.layers[0])
        if block.shortcut:
            groups.append(stream + read_by(block.shortcut))
            stream = made_by(block.shortcut)
        elif not block.residual:
            groups.append(stream)
            stream = []
        stream = stream + made_by(block.layers[-1])
    groups.append(stream + [("linear.weight", 1)])
    return groups[1:]  # the first one is the images'


@pytest.mark.parametrize("make", [
    *(lambda norm=norm: ConvNet3(3, 8, 4, 6, norm) for norm in ("instance", "batch", "none")),
    *(lambda norm=norm: ResNet((1, 1, 1, 1), 3, 8, 4, 4, norm) for norm in ("instance", "batch", "none")),
    lambda: ResNet((2, 2, 2, 2), 3, 72, 4, 2)])
def test_the_papers_networks_have_the_groups_of_how_they_are_built(make):
    model = make()
    size = 72 if hasattr(model, "pool1") and type(model) is ResNet else 8
    found = symmetries.permutation_groups(model, torch.randn(2, 3, size, size))
    assert [[(part.name, part.axis) for part in group.parts] for group in found] == groups_of_the_papers_networks(model)
    for group in found:
        for name, axis, start, stop in group.parts:
            assert (start, stop) == (0, model.state_dict()[name].shape[axis]) and stop % group.size == 0


@pytest.mark.parametrize("model, name", [
    (nn.Sequential(conv(3, 6), conv(6, 6, groups=2), nn.Flatten(), nn.Linear(384, 4)), "Conv2d.*groups=2.* in 1"),
    (nn.Sequential(conv(3, 6), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(384, 4)), "GroupNorm.2, 6.* in 1"),
    (nn.Sequential(conv(3, 6), nn.Softmax(1), nn.Flatten(), nn.Linear(384, 4)), "Softmax.* in 1"),
    (Own(lambda net, x: net.a(x).flatten(1) if x.sum() > 0 else x, a=conv(3, 4)), "cannot trace"),
    (Own(lambda net, x: torch.sigmoid(net.a(x)).flatten(1), a=conv(3, 4)), "the operation sigmoid")])
def test_what_is_not_understood_is_named(model, name):
    with pytest.raises(UserError, match=f"--align cannot follow .*{name}"):
        symmetries.permutation_groups(model, torch.randn(2, *SHAPE))


def test_sliced_units_and_those_of_images_and_logits_stay():
    model = Own(lambda net, x: net.head((net.a(x)[:, :2] + net.b(x)).mean((2, 3))), a=conv(3, 4), b=conv(3, 2),
                head=nn.Linear(2, 4))
    assert symmetries.permutation_groups(model, torch.randn(2, *SHAPE)) == []


def test_a_layer_of_two_names_is_relabelled_under_both():
    def twice():
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4))
        model.add_module("again", nn.Module())
        model.again.layer = model[1]
        return Own(lambda net, x: net.body[3](net.body[2](net.body[1](net.body[0](x)))), body=model)

    model, images = drawn(twice)
    wanted = model(images)
    model.load_state_dict(relabelled(model.state_dict(), symmetries.permutation_groups(model, images)))
    torch.testing.assert_close(model(images), wanted, rtol=1e-12, atol=1e-12)
