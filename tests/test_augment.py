"""Augmentation against closed forms, numerical gradients and published ranges."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.augment import Draw, cutmix, draw_cutmix, draw_dsa, draw_imagenet, dsa, imagenet_augment
from common.data import Split
from common.streams import random_stream


def draw(**changes):
    """One draw for all images, neutral but for `changes`."""
    values = dict(flip=False, brightness=0., saturation=1., contrast=1., x=0., y=0.) | changes
    geometry = values.pop("geometry", "crop")
    return Draw(geometry=geometry, **{name: torch.tensor([value]) for name, value in values.items()})


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
    draws = [draw_dsa(generator, 10) for _ in range(300)]
    for field, lowest, highest in (("brightness", -.5, .5), ("saturation", 0, 2), ("contrast", .5, 1.5), ("x", -1, 1)):
        values = torch.cat([getattr(d, field) for d in draws])
        assert lowest <= values.min() < lowest + .01 and highest - .01 < values.max() <= highest
    for geometry in ("crop", "scale", "rotate"):
        assert abs(sum(d.geometry == geometry for d in draws) / 300 - 1 / 3) < .1
    flips = torch.cat([d.flip for d in draws])
    assert abs(flips.float().mean() - .5) < .04
    assert not draw_dsa(generator, 50, flip=False).flip.any()


def one_image(x, d, i):
    """Image i of x [N, C, H, W] under its draw, pixel by pixel as IDC's code says, in float64."""
    flip, brightness, saturation, contrast, horizontal, vertical = (
        getattr(d, name)[i].item() for name in ("flip", "brightness", "saturation", "contrast", "x", "y"))
    image = x[i].double()
    image = image.flip(2) if flip else image
    image = image + brightness
    grey = image.mean(0, keepdim=True)
    image = (image - grey) * saturation + grey
    image = (image - image.mean()) * contrast + image.mean()
    size = image.shape[-1]
    if d.geometry == "crop":
        pad = int(.125 * size + .5)
        dy, dx = (min(int((place + 1) / 2 * (2 * pad + 1)), 2 * pad) for place in (vertical, horizontal))
        return F.pad(image, [pad] * 4)[:, dy:dy + size, dx:dx + size]
    if d.geometry == "scale":
        sx, sy = ((place + 1) / 2 * (1.2 - 1 / 1.2) + 1 / 1.2 for place in (horizontal, vertical))
        rows = [[sx, 0, 0], [0, sy, 0]]
    else:
        angle = math.radians(15) * horizontal
        rows = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
    grid = F.affine_grid(torch.tensor([rows], dtype=torch.float64), (1, *image.shape), align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]


@pytest.mark.parametrize("differentiated", [False, True])  # by the compiled op, and by PyTorch
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("geometry", ["crop", "scale", "rotate"])
def test_every_image_has_its_own_draw(geometry, channels, differentiated):
    generator = random_stream(3)
    x = torch.randn(16, channels, 20, 20, requires_grad=differentiated)
    d = draw_dsa(generator, 16, geometries=(geometry,))
    if channels == 1:
        d = d._replace(saturation=torch.ones(16))
    wanted = torch.stack([one_image(x, d, i) for i in range(16)])
    torch.testing.assert_close(dsa(x, d).double(), wanted, rtol=0, atol=1e-4)
    assert len(set(d.x.tolist())) == 16 and 0 < d.flip.sum() < 16


def test_matched_images_share_one_draw_and_cutout_hides_a_box():
    d = draw_dsa(random_stream(1), geometries=("crop",), cutout=True)
    x = torch.rand(5, 3, 16, 16) + 9.
    y = dsa(x, d)
    hidden = (y == 0).all(1)
    assert all(torch.equal(hidden[0], other) for other in hidden) and 4 <= hidden[0].sum() <= 8 * 8 + 16 * 4
    assert torch.equal(dsa(x[:2], d), y[:2])


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
        *box, kept = draw_cutmix(generator, 6, 32)
        mixed, pasted = cutmix(images, labels, *box)
        fractions.append(kept)
        own = (mixed == images).float().mean((1, 2, 3))
        foreign = pasted != labels
        assert torch.allclose(own[foreign], torch.full_like(own[foreign], kept))
        assert torch.equal(mixed[foreign].amax((1, 2, 3)), torch.maximum(labels, pasted)[foreign].float()) or kept == 1
    # Boxes of an even side, as IDC's, are clipped at the border: more than the half that an unclipped Beta(1, 1) keeps.
    assert min(fractions) < .2 and max(fractions) > .95 and .5 < sum(fractions) / 200 < .75


def as_imagenet(images, mean, std):
    """Images under a draw of ImageNet's augmentation."""
    split = Split(images, torch.zeros(len(images)), mean, std)
    return imagenet_augment(images, split.black, *draw_imagenet(random_stream(0), len(images), 3))


def test_imagenet_augmentation_keeps_a_constant_image_constant_in_space():
    y = as_imagenet(torch.ones(4, 3, 64, 64), (.5, .5, .5), (.2, .2, .2))
    assert y.flatten(2).std(2).max() < 1e-5 and y.flatten(1).std(1).max() < .2


def test_imagenet_brightness_scales_values_in_0_to_1():
    """A black image stays black: its raw value is 0, whatever the factor; lighting alone shifts it."""
    mean, std = (.485, .456, .406), (.229, .224, .225)
    black = -(torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1).expand(64, 3, 8, 8)
    y = as_imagenet(black, mean, std)
    assert abs((y - y.mean(1, keepdim=True)).mean(0) - (black[0] - black[0].mean(0))).max() < .5
    assert abs(y.mean() - black.mean()) < .02
