"""Scores at initialisation against their definitions, computed in another way, and against what was published."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.data import Split
from common.masks import apply_mask, dense_mask, pruned
from common.networks import build_network
from common.scores import SCORES, scores_of
from common.streams import global_generators_kept, random_stream
from samples import blobs, config, half_mask


def perceptron(*widths, bias=True, seed=0):
    """Linear layers with ReLU between them, in float64."""
    with global_generators_kept():
        torch.manual_seed(seed)
        layers = [[nn.Linear(a, b, bias), nn.ReLU()] for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers))[:-1].double()


@pytest.fixture
def tiny():
    """A network of 3-4-2 units, a split for it, a mask of half of its weights."""
    network = perceptron(3, 4, 2)
    split = Split(torch.randn(30, 3, generator=random_stream(1), dtype=torch.float64), torch.arange(30) % 2)
    return network, split, half_mask(network)


def loss_at(network, split, weights):
    return F.cross_entropy(torch.func.functional_call(network, weights, split.images), split.labels)


def masked_weights(network, mask):
    return {name: (network.get_parameter(name) * kept).detach() for name, kept in mask.items()}


def entries(mask):
    """(name, index) of every weight."""
    return [(name, tuple(index)) for name, kept in mask.items() for index in torch.ones_like(kept).nonzero().tolist()]


def test_snip_is_the_change_of_the_loss_with_a_weights_connection(tiny):
    network, split, mask = tiny
    scores, weights, h = scores_of("snip", network, mask, split), masked_weights(network, mask), 1e-6
    for name, index in entries(mask):
        losses = []
        for strength in (1 + h, 1 - h):
            changed = weights[name].clone()
            changed[index] *= strength
            losses.append(loss_at(network, split, weights | {name: changed}))
        assert float(scores[name][index]) == pytest.approx(abs((losses[0] - losses[1]).item()) / (2 * h), abs=1e-8)


def test_grasp_is_half_the_change_of_the_gradients_norm(tiny):
    network, split, mask = tiny
    scores, weights, h = scores_of("grasp", network, mask, split), masked_weights(network, mask), 1e-6

    def gradient_norm(weights):  # squared, of the surviving weights
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        parts = torch.autograd.grad(loss_at(network, split, leaves), list(leaves.values()))
        return float(sum(part[kept].square().sum() for part, kept in zip(parts, mask.values())))

    for name, index in entries(mask):
        norms = []
        for strength in (1 + h, 1 - h):
            changed = weights[name].clone()
            changed[index] *= strength
            norms.append(gradient_norm(weights | {name: changed}))
        assert float(scores[name][index]) == pytest.approx((norms[0] - norms[1]) / (2 * h) / 2, abs=1e-8)


def test_synflow_is_the_sum_over_paths(tiny):
    _, split, _ = tiny
    network = perceptron(3, 4, 2, bias=False)
    mask = half_mask(network)
    first, second = (weight.abs() for weight in masked_weights(network, mask).values())
    paths = torch.einsum("ji,kj->kji", first, second)  # a path from input i over unit j to output k
    scores = scores_of("synflow", network, mask, split)
    assert torch.allclose(scores["0.weight"], paths.sum(0))
    assert torch.allclose(scores["2.weight"], paths.sum(2))


def test_synflow_flows_equally_through_every_layer():
    """Tanaka et al. 2020, Theorem 1: in layers that all paths pass, the scores sum up to R."""
    network, split = build_network(config(width=8, image_size=8, num_classes=3)), blobs()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    sums = [float(score.sum()) for score in scores_of("synflow", network, dense_mask(network), split).values()]
    assert sums == pytest.approx(4 * [sums[0]]) and sums[0] > 0


def masks_of(kind, network, split, kept, rounds):
    """The mask after pruning to the fraction `kept` in equal rounds."""
    mask = dense_mask(network)
    for _ in range(rounds):
        mask = pruned(scores_of(kind, network, mask, split), mask, 1 - kept ** (1 / rounds))
    return mask


def lost_layers(mask):
    return [name for name, kept in mask.items() if not kept.any()]


def test_layers_collapse_but_not_under_iterative_synflow():
    """Tanaka et al. 2020, Fig. 1 and Sec. 6: at sparsities at which one-shot scores remove a whole layer."""
    network = perceptron(8, 64, 512, 64, 4)
    split = Split(torch.randn(40, 8, generator=random_stream(2), dtype=torch.float64), torch.arange(40) % 4)
    total = sum(kept.numel() for kept in dense_mask(network).values())
    few = 24 / total  # four layers could be kept with four weights
    assert lost_layers(masks_of("magnitude", network, split, few, 1))
    assert lost_layers(masks_of("snip", network, split, few, 1))
    assert lost_layers(masks_of("synflow", network, split, few, 1))
    assert lost_layers(masks_of("synflow", network, split, few, 100)) == []


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("model, norm", [("convnet3", "instance"), ("resnet10", "batch")])
def test_scores_leave_the_network_alone_and_pruned_weights_out(kind, model, norm):
    network, split = build_network(config(model, width=4, image_size=16, num_classes=3, norm=norm)), blobs(size=16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    mask = half_mask(network)
    scores = scores_of(kind, network, mask, split)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for name, kept in mask.items():
        assert scores[name].shape == kept.shape and not scores[name][~kept].any()
    assert sum(float(score.abs().sum()) for score in scores.values()) > 0
    apply_mask(network, mask)
    again = scores_of(kind, network, mask, split)
    assert all(torch.equal(scores[name], again[name]) for name in mask)


def test_scores_of_many_images_are_those_of_one_batch():
    network = build_network(config(width=4, image_size=8, num_classes=3)).double()
    split = blobs(n=600)
    split = Split(split.images.double(), split.labels)
    mask = dense_mask(network)
    weights = {name: network.get_parameter(name) for name in mask}
    gradients = torch.autograd.grad(F.cross_entropy(network(split.images), split.labels), list(weights.values()))
    for (name, score), gradient in zip(scores_of("snip", network, mask, split).items(), gradients):
        assert torch.allclose(score, (weights[name] * gradient).abs())
