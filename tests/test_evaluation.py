"""Losses of networks and of points against sums written out; BatchNorm's statistics."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from samples import blobs, config, half_mask

from common.errors import UserError
from common.evaluation import check_losses, evaluate, evaluate_points, refresh_batchnorm
from common.masks import apply_mask
from common.networks import build_network
from common.streams import random_stream
from common.training import Recipe, train


def test_evaluation_is_the_mean_cross_entropy_and_its_standard_error():
    model, split = build_network(config(width=4, image_size=8, num_classes=3)), blobs(50)
    losses = F.cross_entropy(model.double()(split.images.double()), split.labels, reduction="none")
    score = evaluate(model.float(), split, batch_size=7)
    assert score.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert score.loss_error == pytest.approx(losses.std().item() / math.sqrt(50), rel=1e-4)


@pytest.mark.parametrize("model", ["convnet3", "resnet10"])
def test_points_are_evaluated_like_networks_of_their_own(model):
    settings, split = config(model, width=8, image_size=8, num_classes=3), blobs()
    networks = [build_network(settings, seed) for seed in (0, 1, 2)]
    for seed, network in enumerate(networks):
        train(network, blobs(seed=seed), Recipe(2), random_stream(seed))
    states = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]
    mask, coefficients = half_mask(networks[0]), [(1, 0, 0), (.2, .5, .3)]
    scores = evaluate_points(networks[0], states, coefficients, [split], mask)
    for weights, (score,) in zip(coefficients, scores, strict=True):
        fresh = build_network(settings)
        fresh.load_state_dict({k: sum(w * s[k] for w, s in zip(weights, states)) if v.is_floating_point() else v
                               for k, v in states[0].items()})
        apply_mask(fresh, mask)
        assert score.loss == pytest.approx(evaluate(fresh, split).loss, rel=1e-5)


def test_batchnorm_refresh_is_the_average_over_batches():
    norm = torch.nn.BatchNorm2d(3)
    split = blobs(60)
    refresh_batchnorm(torch.nn.Sequential(norm), split, batch_size=20)
    parts = split.images.split(20)
    assert torch.allclose(norm.running_mean, torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0), atol=1e-6)
    variances = torch.stack([p.transpose(0, 1).flatten(1).var(1) for p in parts])
    assert torch.allclose(norm.running_var, variances.mean(0), atol=1e-5)
    assert norm.momentum == .1 and not norm.training


def test_soft_labels_count_as_their_likeliest_class():
    model, split = build_network(config(width=4, image_size=8, num_classes=3)), blobs(3)
    soft = replace(split, labels=F.one_hot(split.labels, 3) * .6 + .1)
    states = [model.state_dict()] * 2
    assert evaluate(model, soft) == evaluate(model, split)
    assert evaluate_points(model, states, [(.5, .5)], [soft]) == evaluate_points(model, states, [(.5, .5)], [split])


def test_a_loss_that_is_not_finite_is_refused_with_a_way_out():
    check_losses([1., 2.], "a line")
    for loss in (math.nan, math.inf):
        with pytest.raises(UserError, match=f"a line: the loss is {loss}.*--lr"):
            check_losses([1., loss], "a line")
