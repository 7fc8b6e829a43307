"""Augmentation against closed forms, numerical gradients and published ranges."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.augment import Draw, cutmix, draw_dsa, dsa, imagenet_augment
from common.streams import random_stream


def draw(**changes):
    neutral = Draw(flip=False, brightness=0., saturation=1., contrast=1., geometry="crop", x=0., y=0.)
    return neutral._replace(**changes)


def test_neutral_draw_changes_nothing():
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(dsa(x, draw()), x, atol=1e-6)


@pytest.mark.parametrize("changes, expected", [
    (dict(flip=True), lambda x: x.flip(3)), (dict(brightness=.3), lambda x: x + .3),
    (dict(saturation=0.), lambda x: x.mean(1, keepdim=True).expand_as(x)),
    (dict(contrast=.5), lambda x: (x + x.mean((1, 2, 3), keepdim=True)) / 2),
    (dict(x=1., y=-1.), lambda x: F.pad(x, [-4, 4, 4, -4]))])
def test_each_part_of_dsa(changes, expected):
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(dsa(x, draw(**changes)), expected(x), atol=1e-6)


def test_rotation_turns_by_fifteen_degrees_at_most():
    x = torch.zeros(1, 1, 65, 65)
    x[0, 0, 31:34, 60:63] = 1.  # a dot right of the centre
    y = dsa(x, draw(geometry="rotate", x=1.))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(65.), torch.arange(65.), indexing="ij")
    centre = [((y * axis).sum() / y.sum()).item() - 32 for axis in (rows, columns)]
    assert abs(abs(math.degrees(math.atan2(*centre))) - 15) < .5


def test_draws_stay_in_idcs_ranges_and_reach_them():
    generator = random_stream(0)
    draws = [draw_dsa(generator) for _ in range(3000)]
    for field, lowest, highest in (("brightness", -.5, .5), ("saturation", 0, 2), ("contrast", .5, 1.5), ("x", -1, 1)):
        values = [getattr(d, field) for d in draws]
        assert lowest <= min(values) < lowest + .01 and highest - .01 < max(values) <= highest
    for geometry in ("crop", "scale", "rotate"):
        assert abs(sum(d.geometry == geometry for d in draws) / 3000 - 1 / 3) < .04
    assert abs(sum(d.flip for d in draws) / 3000 - .5) < .04
    assert not any(draw_dsa(generator, flip=False).flip for _ in range(50))


def test_dsa_is_differentiable():
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for geometry in ("crop", "scale", "rotate"):
        changed = draw(flip=True, brightness=.1, saturation=.7, contrast=1.2, geometry=geometry, x=.3, y=-.6)
        assert torch.autograd.gradcheck(lambda x: dsa(x, changed), x)


def test_cutmix_pastes_the_area_it_says():
    labels = torch.arange(6)
    images = labels.view(-1, 1, 1, 1).float().expand(6, 3, 32, 32)
    generator = random_stream(0)
    fractions = []
    for _ in range(200):
        mixed, pasted, kept = cutmix(images, labels, generator)
        fractions.append(kept)
        own = (mixed == images).float().mean((1, 2, 3))
        foreign = pasted != labels
        assert torch.allclose(own[foreign], torch.full_like(own[foreign], kept))
        assert torch.equal(mixed[foreign].amax((1, 2, 3)), torch.maximum(labels, pasted)[foreign].float()) or kept == 1
    # Boxes are clipped at the border, so more than the half that an unclipped Beta(1, 1) keeps.
    assert min(fractions) < .2 and max(fractions) > .95 and .5 < sum(fractions) / 200 < .75


def test_imagenet_augmentation_keeps_a_constant_image_constant_in_space():
    y = imagenet_augment(torch.ones(4, 3, 64, 64), random_stream(0))
    assert y.flatten(2).std(2).max() < 1e-5 and y.flatten(1).std(1).max() < .2
