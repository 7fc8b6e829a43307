"""A view is the network's function, whatever the network: random networks of others, compiled against plain PyTorch."""
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from common.evaluation import combine, evaluate, evaluate_points
from common.data import Split
from common.kernels import dense, ops, views
from common.kernels.views import view
from common.masks import dense_mask
from common.networks import ConvNet3, ResNet, blocks_of, prunable
from common.streams import random_stream
from common.training import Recipe, train

pytestmark = pytest.mark.skipif(not ops.load(), reason="needs the extension")


def batch(seed, channels=3, size=8, classes=5, count=6):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(classes, (count,), generator=generator)


def numbers(model, network, images, labels):
    """Logits and gradients in train mode, running statistics after it, logits in eval mode."""
    torch.manual_seed(3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = network(images)
    grads = torch.autograd.grad(F.cross_entropy(logits, labels), parameters, allow_unused=True, materialize_grads=True)
    model.eval()
    with torch.no_grad():
        return [logits, *grads, *[b.double() for b in model.buffers()], network(images)]


def same(model, images, labels):
    """Whether there is a view of a copy; it must give what another copy gives."""
    plain, twin = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    fast = view(twin, sample=(images, labels))
    try:
        wanted = numbers(plain, plain, images, labels)
    except RuntimeError:  # PyTorch itself cannot differentiate this one: two in-place layers in a row
        return False
    for one, other in zip(wanted, numbers(twin, fast, images, labels)):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    return fast is not twin


def random_sequence(choose):
    """A random nn.Sequential: shared activations and pools, repeated and tied layers, in-place and frozen ones."""
    relu, pool, drop = nn.ReLU(inplace=choose.random() < .5), nn.AvgPool2d(2), nn.Dropout(.3)
    repeated, layers, channels, size = None, [], 3, 8
    for _ in range(choose.randint(1, 4)):
        width = choose.choice([4, 6, 16])
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=choose.random() < .5)
        for other in layers:
            if isinstance(other, nn.Conv2d) and other.weight.shape == conv.weight.shape:
                conv.weight = other.weight
        norm = choose.choice([nn.BatchNorm2d(width), nn.GroupNorm(width, width), nn.GroupNorm(2, width),
                              nn.InstanceNorm2d(width, affine=True), nn.BatchNorm2d(width, track_running_stats=False)])
        layers += [conv, norm] if choose.random() < .8 else [conv]
        layers.append(choose.choice([relu, nn.ReLU(), nn.LeakyReLU(.1, inplace=True), nn.ReLU6(inplace=True),
                                     nn.Identity(), nn.SiLU()]))
        if size > 2 and choose.random() < .5:
            layers.append(choose.choice([pool, nn.AvgPool2d(2), nn.MaxPool2d(2)]))
            size //= 2
        if choose.random() < .3:
            layers.append(choose.choice([drop, nn.Dropout(.2, inplace=True)]))
        channels = width
        if choose.random() < .4:
            repeated = repeated if repeated is not None and repeated[0].in_channels == width else nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), relu)
            layers += [repeated, repeated]
    if choose.random() < .3:
        layers[0].requires_grad_(False)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 5))


class Indexed(nn.Module):
    """Picks layers of a sequence by number and by name, adds in place, reads a layer's weight."""

    def __init__(self, layers, choose):
        super().__init__()
        self.body, self.head = layers[:-2], nn.LazyLinear(5)
        self.tapped = choose.randrange(len(self.body))
        self.in_place = choose.random() < .5

    def forward(self, x):
        taps = 0.
        for i, layer in enumerate(self.body):
            x = layer(x)
            if i == self.tapped:
                taps = x.mean((1, 2, 3), keepdim=True)
        if self.in_place:
            x = x.clone()
            x += taps
        else:
            x = x + taps
        return self.head(x.flatten(1)) * (2 if self.training else 1)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_of_others_keep_their_function(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    model, data = random_sequence(choose).double(), batch(seed)
    if seed % 2:
        model = Indexed(model, choose).double()
        model(data[0])
    same(model, *data)


def test_a_sequence_of_known_layers_is_fused_and_a_layer_that_is_there_twice_stays_there_twice():
    torch.manual_seed(0)
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), relu, nn.Conv2d(6, 6, 3, padding=1),
                          nn.BatchNorm2d(6), relu, nn.Flatten(), nn.Linear(384, 5)).double()
    assert same(model, *batch(0))


def test_batches_counted_together_are_counted_as_by_each_norm():
    torch.manual_seed(0)
    model = ResNet((1, 1, 1, 1), 3, 8, 5, 4).double().train()
    model.stage2_1.norm1.eval()
    twin, (images, _) = copy.deepcopy(model), batch(0)
    fused = dense.Fused(twin)
    layers = [layer for layer in fused.network.modules() if isinstance(layer, dense.FoldedConv)]
    fused.counted = [layer.norm for layer in layers]  # as on a GPU
    for layer in layers:
        layer.counts = False
    for _ in range(2):
        model(images), fused(images)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_own_networks_that_somebody_changed_are_taken_as_they_are_now():
    def resnet():
        return ResNet((1, 1, 1, 1), 3, 8, 5, 4)

    changed = [resnet() for _ in range(4)]
    changed[0].relu1 = nn.Sigmoid()
    changed[1].stage2_1.relu1 = nn.Sequential(nn.ReLU(), nn.AvgPool2d(1))
    changed[2].linear = nn.Sequential(nn.Dropout(0.), changed[2].linear)
    changed[3].stage1_1.conv1.register_forward_hook(lambda module, inputs, output: output * 0)
    for model in changed:
        same(model.double(), *batch(1))
        mask = dense_mask(model)
        assert blocks_of(model) is None or views.dense_blocks(model.float(), mask) is None
    convnet = ConvNet3(3, 8, 5, width=4)
    convnet.conv2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
    assert blocks_of(convnet) is None and same(convnet.double(), *batch(2))


def test_a_view_that_gives_other_numbers_is_dropped_and_it_is_said(monkeypatch, capsys):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5))
    images, labels = batch(5)
    monkeypatch.setattr(views, "verdicts", {})
    monkeypatch.setattr(dense.FoldedConv, "forward", lambda self, x, shortcut=None: 2 * self.conv(x))
    for _ in range(2):
        assert view(model, sample=(images.float(), labels)) is model
    assert capsys.readouterr().err.count("its fused form gave other numbers") == 1


def test_a_parameter_of_two_names_has_one_mask_and_is_masked_under_both():
    torch.manual_seed(0)
    first = nn.Linear(12, 12)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), first, nn.Linear(12, 5))
    assert list(prunable(model)) == ["1.weight", "4.weight"]
    mask = {name: torch.rand_like(w) < .5 for name, w in prunable(model).items()}
    images, labels = torch.randn(20, 3, 2, 2), torch.randint(5, (20,))
    split = Split(images, labels)
    states = []
    for order in (0, 1):
        train(model, split, Recipe(2, batch_size=8), random_stream(order), mask)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    states = [{name: value + .1 for name, value in state.items()} for state in states]  # unmasked ends
    (score,), = evaluate_points(model, states, [(.3, .7)], [split], mask)
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(combine(states, (.3, .7)))
    with torch.no_grad():
        for name, kept in mask.items():
            wanted.get_parameter(name).mul_(kept)
    assert score.loss == pytest.approx(evaluate(wanted, split).loss, rel=1e-6)


def test_frozen_layers_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    model[1].requires_grad_(False)
    before = model[1].weight.clone()
    assert list(prunable(model)) == ["3.weight"]
    train(model, Split(torch.randn(20, 3, 2, 2), torch.randint(5, (20,))), Recipe(2, batch_size=8), random_stream(0))
    assert torch.equal(model[1].weight, before)


def test_evaluation_in_chunks_is_for_networks_whose_images_do_not_meet():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(),
                          nn.Linear(144, 5))
    split = Split(torch.randn(150, 3, 8, 8), torch.randint(5, (150,)))
    with torch.no_grad():
        wanted = F.cross_entropy(model.eval()(split.images), split.labels).item()
    assert evaluate(model, split).loss == pytest.approx(wanted, rel=1e-5)


def test_computed_weights_have_no_view():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 5))
    assert not dense.is_known(model) and list(prunable(model)) == ["2.weight"]
