"""Sparse training: kernels against dense convolution in float64, networks against the dense path.

Also with LOTTERY_SPARSE_ISA=portable, avx2 or avx512, which forces one set of kernels (the last test does so).
"""
import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.data import Split
from common.evaluation import evaluate, evaluate_points
from common.kernels import crossover, dense, ops, sparse, views
from common.kernels.views import view
from common.masks import apply_mask
from common.networks import build_network, prunable
from common.streams import random_stream
from common.training import Recipe, train

pytestmark = pytest.mark.skipif(os.environ.get("LOTTERY_OPS") == "fallback" or not ops.load(),
                                reason="needs the extension")

# in, out, height, width, kernel, stride, padding, batch: every kind of layer, odd sizes, batches that fill no vector
LAYERS = [(5, 7, 9, 6, 3, 1, 1, 3), (5, 7, 9, 6, 3, 2, 1, 9), (6, 4, 8, 8, 1, 1, 0, 8), (6, 4, 7, 8, 1, 2, 0, 2),
          (3, 8, 23, 20, 7, 2, 3, 5), (4, 6, 16, 17, 3, 1, 0, 4), (4, 5, 5, 5, 3, 2, 0, 1), (2, 3, 28, 28, 3, 1, 3, 2),
          (70, 40, 4, 4, 3, 1, 1, 20), (9, 33, 1, 1, 1, 1, 0, 11), (4, 3, 2, 10, 3, 2, 1, 1)]


@contextlib.contextmanager
def skipping(choice):
    """Zeros are skipped "on", "off" or "auto"."""
    before = views.skip_zeros.set(choice)
    try:
        yield
    finally:
        views.skip_zeros.reset(before)


def close(actual, wanted, tolerance=2e-6):
    """Equal up to `tolerance` of the largest value."""
    assert actual.shape == wanted.shape
    assert (actual.double() - wanted).abs().max() <= tolerance * (wanted.abs().max() + 1e-3)


def layer(channels, out, height, width, kernel, stride, padding, batch, density):
    """(plan, mask, images, weight, bias) drawn at random; the first output channel is pruned entirely."""
    torch.manual_seed(0)
    mask = torch.rand(out, channels, kernel, kernel) < density
    mask[0] &= density == 1
    plan = torch.classes.lottery.SparseConv(mask, height, width, max(padding, 1), stride, padding)
    return plan, mask, torch.randn(batch, channels, height, width), torch.randn(mask.shape) * mask, torch.randn(out)


def with_gradients(function, *tensors):
    """[function(*tensors), gradient of each tensor] for one random gradient of the output."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, tensors, torch.randn(y.shape).to(y.dtype))]


@pytest.mark.parametrize("density", [0, .1, .5, 1])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_convolution_and_its_gradients_are_the_dense_ones(shape, density):
    plan, mask, *tensors = layer(*shape, density)
    stride, padding = shape[5:7]

    def on_blocks(x, weight, bias):
        return sparse.unblocked(sparse.sparse_conv(plan, sparse.blocked(x, max(padding, 1)), weight, bias)[0])

    actual = with_gradients(on_blocks, *tensors)
    wanted = with_gradients(lambda *t: F.conv2d(*t, stride, padding), *(t.double() for t in tensors))
    wanted[2] *= mask
    for a, w in zip(actual, wanted):
        close(a, w)


def test_gradient_of_a_surviving_weight_that_is_zero():
    plan, mask, x, weight, bias = layer(5, 7, 9, 6, 3, 1, 1, 3, .3)
    _, gradient = with_gradients(lambda w: sparse.unblocked(sparse.sparse_conv(plan, sparse.blocked(x, 1), w)[0]),
                                 weight * 0)
    assert torch.equal(gradient != 0, mask)


def test_inputs_that_are_not_contiguous():
    plan, mask, x, weight, bias = layer(6, 4, 8, 8, 3, 1, 1, 5, .5)
    strided = torch.empty(8, 5, 6, 16).permute(1, 2, 0, 3)[..., ::2].copy_(x)
    last = weight.contiguous(memory_format=torch.channels_last)
    y = sparse.unblocked(sparse.sparse_conv(plan, sparse.blocked(strided, 1), last)[0])
    close(y, F.conv2d(x.double(), weight.double(), padding=1))


def test_layout_round_trip():
    x = torch.randn(11, 3, 5, 4)
    y = sparse.blocked(x, 2)
    assert torch.equal(sparse.unblocked(y), x)
    assert y.data.shape[1:4] == (3, 9, 8) and y.data.count_nonzero() == x.count_nonzero()


@pytest.mark.parametrize("images", [3, 16, 21])
def test_layout_of_many_channels_and_its_gradient(images):
    x = torch.randn(images, 48, 5, 4, requires_grad=True)
    y = sparse.blocked(x, 1)
    assert torch.equal(sparse.unblocked(y), x)
    assert torch.equal(y.data, torch.cat([sparse.blocked(x[:, c:c + 1], 1).data for c in range(48)], 1))
    weight = torch.randn(x.shape)
    assert torch.equal(torch.autograd.grad((sparse.unblocked(y) * weight).sum(), x)[0], weight)


def test_wrong_shapes_are_named():
    plan, mask, x, weight, bias = layer(5, 7, 9, 6, 3, 1, 1, 3, .3)
    with pytest.raises(RuntimeError, match="x should be contiguous float32"):
        sparse.sparse_conv(plan, sparse.blocked(x[:, :, 1:], 1), weight)
    with pytest.raises(RuntimeError, match="weight should be"):
        sparse.sparse_conv(plan, sparse.blocked(x, 1), weight[1:])
    with pytest.raises(RuntimeError, match="multiple of 16"):
        torch.ops.lottery.sparse_blocked(x.contiguous(memory_format=torch.channels_last), 1)
    with pytest.raises(RuntimeError, match="stride should be 1 or 2, got 3"):
        torch.classes.lottery.SparseConv(mask, 9, 6, 1, 3, 1)


#############################################
#                 Networks                  #
#############################################

NETWORKS = [("convnet3", "instance", 32, 11), ("convnet3", "batch", 28, 3), ("convnet3", "none", 8, 8),
            ("resnet10", "batch", 32, 11), ("resnet10", "instance", 32, 1), ("resnet10", "batch", 96, 3)]


def ticket(model, norm, size, density=.3, width=8):
    """A small network with random affine parameters, masked at random, and the mask."""
    torch.manual_seed(0)
    shape = dict(channels=3, image_size=size, num_classes=10)
    network = build_network(dict(model=model, norm=norm, width=width) | shape)
    for p in network.parameters():
        p.data += .2 * torch.randn(p.shape) * (p.dim() == 1)
    mask = {name: torch.rand(weight.shape) < density for name, weight in prunable(network).items()}
    apply_mask(network, mask)
    return network, mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model, norm, size, batch", NETWORKS)
def test_network_gradients_and_statistics_are_the_dense_ones(model, norm, size, batch, training):
    network, mask = ticket(model, norm, size)
    dense = ticket(model, norm, size)[0].double()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    network.train(training), dense.train(training)
    logits, wanted = sparse.SparseNetwork(network, mask)(images), dense(images.double())
    close(logits, wanted, 1e-5)
    grads = torch.autograd.grad(F.cross_entropy(logits, labels), list(network.parameters()))
    wanted = torch.autograd.grad(F.cross_entropy(wanted, labels), list(dense.parameters()))
    for (name, _), gradient, expected in zip(network.named_parameters(), grads, wanted):
        close(gradient, expected * mask[name] if name in mask else expected, 1e-4)
    for buffer, expected in zip(network.buffers(), dense.buffers()):
        close(buffer, expected, 1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model, norm, begins", [("convnet3", "instance", 1), ("convnet3", "batch", 2),
                                                ("resnet10", "batch", 1), ("resnet10", "batch", 3)])
def test_networks_that_begin_dense(monkeypatch, model, norm, begins, training):
    network, mask = ticket(model, norm, 16, width=16)
    monkeypatch.setattr(views, "first_sparse_block", lambda *_: begins)
    torch.manual_seed(1)  # draws no ReLU's argument within rounding of 0, where gradients jump
    images, labels = torch.randn(5, 3, 16, 16), torch.randint(0, 10, (5,))
    exact, results = copy.deepcopy(network).double().train(training), []
    fast = view(network.train(training), mask)
    assert len(fast.dense) == begins and len(fast.parts) > begins
    for owner, function, data in (network, fast, images), (exact, exact, images.double()):
        logits = function(data)
        weights = {name: owner.get_parameter(name) for name in mask}
        grads = torch.autograd.grad(F.cross_entropy(logits, labels), weights.values())
        results.append([logits, *(grad * mask[name] for name, grad in zip(weights, grads))])
    for one, other in zip(*results):
        close(one, other, 1e-4)
    with torch.no_grad():
        close(view(network.eval(), mask)(images), exact.eval()(images.double()), 1e-5)


@pytest.mark.parametrize("model, norm", [("convnet3", "instance"), ("resnet10", "batch")])
def test_bits_do_not_depend_on_threads(model, norm):
    network, mask = ticket(model, norm, 32)
    images, results = torch.randn(20, 3, 32, 32), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y = sparse.SparseNetwork(network, mask)(images)
            weights = [p for p in network.parameters() if p.dim() == 4]
            results.append([y, *torch.autograd.grad(y.square().sum(), weights)])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_auto_stays_dense_where_little_is_pruned(monkeypatch):
    monkeypatch.setattr(crossover, "costs_of", lambda _: [(1., 0., 0., 4.)] * 3)
    network, mask = ticket("convnet3", "instance", 32, density=.8)
    assert isinstance(view(network, mask), dense.Fused)
    with skipping("on"):
        assert isinstance(view(network, mask), sparse.SparseNetwork)
    network, mask = ticket("convnet3", "instance", 32, density=.1)
    assert isinstance(view(network, mask), sparse.SparseNetwork) and views.path(network, mask) == "sparse"
    assert isinstance(view(network, mask, skip=False), dense.Fused) and views.path(network) == "dense"
    with skipping("off"):
        assert isinstance(view(network, mask), dense.Fused) and views.path(network, mask) == "dense"
    assert isinstance(view(network.double(), mask), dense.Fused)


@pytest.mark.parametrize("model, norm", [("convnet3", "instance"), ("resnet10", "batch")])
def test_training_follows_the_dense_path(model, norm):
    torch.manual_seed(0)
    split = Split(torch.randn(96, 3, 32, 32), torch.randint(0, 10, (96,)))
    states = {}
    for choice in ("on", "off"):
        network, mask = ticket(model, norm, 32)
        with skipping(choice):
            trained = train(network, split, Recipe(2, batch_size=32), random_stream(0), mask)
        assert all((network.get_parameter(name)[~kept] == 0).all() for name, kept in mask.items())
        states[choice] = network.state_dict()
        scores = []
        for other in ("on", "off"):
            with skipping(other):
                scores.append(evaluate(network, split))
        assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)
        states[choice]["loss"] = torch.tensor(trained.loss)
    for name, value in states["on"].items():
        close(value, states["off"][name].double(), 1e-3)


def test_points_of_weight_space():
    network, mask = ticket("convnet3", "instance", 32)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    other = {name: value * .9 for name, value in state.items()}
    split = Split(torch.randn(70, 3, 32, 32), torch.randint(0, 10, (70,)))
    arguments = network, [state, other], [(1., 0.), (.5, .5), (0., 1.)], [split], mask
    scores = []
    for choice in ("on", "off"):
        with skipping(choice):
            scores.append(evaluate_points(*arguments))
    for (on,), (off,) in zip(*scores):
        assert on.loss == pytest.approx(off.loss, rel=1e-5) and on.accuracy == off.accuracy


@pytest.mark.skipif("LOTTERY_SPARSE_ISA" in os.environ, reason="runs inside itself")
def test_portable_kernels():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
                          env=os.environ | {"LOTTERY_SPARSE_ISA": "portable"}, cwd=Path(__file__).parent.parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
