"""Networks, data formats, augmentation and training against published counts, closed forms and torch itself."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import splits
from common import UserError, random_stream
from splits import DATASETS

CIFAR = DATASETS["cifar10"]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def config(model="convnet3", **changes):
    return dict(model=model, channels=3, image_size=32, num_classes=10) | changes


def blobs(n=60, size=8, classes=3, seed=0):
    """A split of noisy constant images whose colour tells the class."""
    labels = torch.arange(n) % classes
    noise = torch.randn(n, 3, size, size, generator=random_stream(seed))
    return common.Split(noise + labels.view(-1, 1, 1, 1) - 1., labels)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("model, size, parameters, prunable", [
    ("convnet3", 32, 320_010, 318_848), ("resnet10", 32, 1_228_970, 1_226_080), ("resnet18", 32, 2_797_610, 2_792_800),
    ("resnet10", 224, None, 4_905_152), ("resnet18", 224, None, 11_172_032)])
def test_parameter_counts_are_the_papers(model, size, parameters, prunable):
    network = common.build_network(config(model, image_size=size))
    assert sum(w.numel() for w in common.prunable(network).values()) == prunable
    assert parameters in (None, sum(p.numel() for p in network.parameters()))


@pytest.mark.parametrize("model", ["convnet3", "resnet10"])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("channels, size", [(1, 8), (1, 28), (3, 32), (3, 96)])
def test_networks_take_every_input_size(model, norm, channels, size):
    network = common.build_network(config(model, width=4, norm=norm, channels=channels, image_size=size))
    assert network(torch.randn(2, channels, size, size)).shape == (2, 10)


def test_group_norm_of_convnet3_is_instance_norm():
    network, x = common.build_network(config(width=4)), torch.randn(2, 4, 8, 8)
    assert torch.allclose(network.norm2(x), F.instance_norm(x), atol=1e-6)


def test_resnet_convolutions_are_drawn_with_the_papers_standard_deviation():
    weight = common.build_network(config("resnet18")).stage4_2.conv2.weight
    assert abs(weight.std().item() / math.sqrt(2 / (9 * 256)) - 1) < .01


def test_networks_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text("from torch import nn\n"
                                       "def tiny(num_classes):\n    return nn.Linear(4, num_classes)\n")
    monkeypatch.chdir(tmp_path)
    assert common.build_network(config("mynet:tiny", num_classes=7)).out_features == 7
    with pytest.raises(UserError, match="mynet:big"):
        common.build_network(config("mynet:big"))


def test_building_a_network_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    common.build_network(config(width=4), seed=5)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- real data


def test_npz_class_folders_and_subset(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 4
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=images, labels=labels)
        for i in range(8):
            folder = tmp_path / "folders" / part / f"class{labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(folder / f"{i}.png")
    settings = dict(dataset=str(tmp_path), train_images=10)
    train, test = splits.load_real(settings, "unused")
    assert (len(train), len(test)) == (10, 40) and settings["num_classes"] == 4 and settings["image_size"] == 8
    assert torch.equal(test.images[3], torch.from_numpy(images[3]).permute(2, 0, 1))
    batch = test.batch(slice(0, None))[0]
    assert batch.mean((0, 2, 3)).abs().max() < 1e-3 and (batch.std((0, 2, 3)) - 1).abs().max() < 1e-3
    train, _ = splits.load_real(dict(dataset=str(tmp_path / "folders"), image_size=8), "unused")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(train.images[1], torch.from_numpy(images[4]).permute(2, 0, 1))


def test_pictures_of_any_size_are_resized_and_cut():
    picture = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (30, 1)))  # 60 wide, 30 high
    assert splits.fit(picture, 16).size == (16, 16)
    assert abs(np.asarray(splits.fit(picture, 30)).mean() - 29.5) < 1  # the centre, not a squeezed whole


def test_digits_are_embedded():
    settings = dict(dataset="digits")
    train, test = splits.load_real(settings, "no-such-folder")
    assert (len(train), len(test), train.images.shape[1:]) == (1437, 360, (1, 8, 8))
    assert settings["num_classes"] == 10 and torch.bincount(test.labels).tolist() == [36] * 10


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not a zip"])
def test_damaged_npz_is_named(tmp_path, content):
    for part in ("train", "test"):
        (tmp_path / f"{part}.npz").write_bytes(content)
    with pytest.raises(UserError, match="train.npz"):
        splits.load_real(dict(dataset=str(tmp_path)), "unused")


# ---------------------------------------------------------------- distilled data


@pytest.fixture
def stored():
    """Three images a class in [0, 1], ten classes, and their labels."""
    return torch.rand(30, 3, 32, 32, generator=random_stream(1)), torch.arange(10).repeat_interleave(3)


def normalised(images):
    return (images - torch.tensor(CIFAR.mean).view(3, 1, 1)) / torch.tensor(CIFAR.std).view(3, 1, 1)


def test_distilled_formats_are_told_apart(tmp_path, stored):
    images, labels = stored
    torch.save([images, labels], tmp_path / "data.pt")
    torch.save({"data": [[images * 0, labels], [normalised(images), labels]]}, tmp_path / "res_DC.pt")
    torch.save([normalised(images).permute(0, 2, 3, 1)], tmp_path / "kip.pt")
    torch.save(normalised(images), tmp_path / "images_best.pt")
    torch.save(labels, tmp_path / "labels_best.pt")
    for name in ("data.pt", "res_DC.pt", "kip.pt", "images_best.pt"):
        split = splits.load_distilled(tmp_path / name, CIFAR, ipc=3)
        assert torch.allclose(split.images, normalised(images), atol=1e-5) and torch.equal(split.labels, labels), name


def test_distilled_class_folders_and_contact_sheet(tmp_path, stored):
    images = (stored[0] * 255).byte()
    sheet = images.reshape(10, 3, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(320, 96, 3).numpy()
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    for i, image in enumerate(images):
        folder = tmp_path / "set" / f"{i // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).convert("RGBA").save(folder / f"{i:02}.png")
    for path in (tmp_path / "sheet.png", tmp_path / "set"):
        assert torch.allclose(splits.load_distilled(path, CIFAR, 3).images, normalised(images / 255), atol=1e-5), path


def test_tiles_are_cut_row_by_row_and_resized():
    tiles = torch.tensor([1., 2., 3., 4.])
    image = torch.empty(1, 1, 8, 8)
    for k, value in enumerate(tiles):
        image[:, :, k // 2 * 4:k // 2 * 4 + 4, k % 2 * 4:k % 2 * 4 + 4] = value
    decoded, labels = splits.decode_tiles(torch.cat([image, 10 * image]), torch.tensor([0, 1]), 2)
    assert decoded.shape == (8, 1, 8, 8) and labels.tolist() == [0] * 4 + [1] * 4
    assert torch.allclose(decoded[:, 0].flatten(1).mean(1), torch.cat([tiles, 10 * tiles]))
    assert decoded[0].std() == 0


def test_tiles_of_a_size_that_does_not_divide_are_padded_with_grey():
    decoded, _ = splits.decode_tiles(torch.zeros(1, 1, 8, 8), torch.tensor([0]), 3)  # tiles of ceil(8/3) = 3 pixels
    expected = torch.zeros(9, 9)
    expected[8:], expected[:, 8:] = .5, .5
    last = F.interpolate(expected[None, None, 6:, 6:], size=(8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(decoded[8], last[0])


@pytest.mark.parametrize("change, message", [
    (lambda x, y: [x[:, :, :16, :16], y], "16 x 16"), (lambda x, y: [x[:29], y[:29]], "--ipc 3"),
    (lambda x, y: [x * math.nan, y], "not finite"), (lambda x, y: {"weights": x}, "known format")])
def test_wrong_distilled_sets_are_named(tmp_path, stored, change, message):
    torch.save(change(*stored), tmp_path / "data.pt")
    with pytest.raises(UserError, match=message):
        splits.load_distilled(tmp_path / "data.pt", CIFAR, 3)


def test_whitened_set_is_warned_about(tmp_path, stored, capsys):
    torch.save({"data": [[torch.randn(30, 3, 32, 32) * .55, stored[1]]]}, tmp_path / "res.pt")
    splits.load_distilled(tmp_path / "res.pt", CIFAR, 3)
    assert "ZCA" in capsys.readouterr().err


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="bomb.pt"):
        common.load(tmp_path / "bomb.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="published sets are not at hand")
@pytest.mark.parametrize("name, ipc", [("mtt_cifar10_ipc1", 1), ("mtt_cifar10_ipc10", 10), ("mtt_cifar10_ipc50", 50),
                                       ("dc_cifar10_ipc10.pt", 10)])
def test_published_sets(name, ipc):
    split = splits.load_distilled(SHARED / "distilled" / name, CIFAR, ipc)
    assert split.images.shape == (10 * ipc, 3, 32, 32) and .8 < split.images.std() < 1.4


# ---------------------------------------------------------------- augmentation


def draw(**changes):
    neutral = common.Draw(flip=False, brightness=0., saturation=1., contrast=1., geometry="crop", x=0., y=0.)
    return neutral._replace(**changes)


def test_neutral_draw_changes_nothing():
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(common.dsa(x, draw()), x, atol=1e-6)


@pytest.mark.parametrize("changes, expected", [
    (dict(flip=True), lambda x: x.flip(3)), (dict(brightness=.3), lambda x: x + .3),
    (dict(saturation=0.), lambda x: x.mean(1, keepdim=True).expand_as(x)),
    (dict(contrast=.5), lambda x: (x + x.mean((1, 2, 3), keepdim=True)) / 2),
    (dict(x=1., y=-1.), lambda x: F.pad(x, [-4, 4, 4, -4]))])
def test_each_part_of_dsa(changes, expected):
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(common.dsa(x, draw(**changes)), expected(x), atol=1e-6)


def test_rotation_turns_by_fifteen_degrees_at_most():
    x = torch.zeros(1, 1, 65, 65)
    x[0, 0, 31:34, 60:63] = 1.  # a dot right of the centre
    y = common.dsa(x, draw(geometry="rotate", x=1.))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(65.), torch.arange(65.), indexing="ij")
    centre = [((y * axis).sum() / y.sum()).item() - 32 for axis in (rows, columns)]
    assert abs(abs(math.degrees(math.atan2(*centre))) - 15) < .5


def test_draws_stay_in_idcs_ranges_and_reach_them():
    generator = random_stream(0)
    draws = [common.draw_dsa(generator) for _ in range(3000)]
    for field, lowest, highest in (("brightness", -.5, .5), ("saturation", 0, 2), ("contrast", .5, 1.5), ("x", -1, 1)):
        values = [getattr(d, field) for d in draws]
        assert lowest <= min(values) < lowest + .01 and highest - .01 < max(values) <= highest
    for geometry in ("crop", "scale", "rotate"):
        assert abs(sum(d.geometry == geometry for d in draws) / 3000 - 1 / 3) < .04
    assert abs(sum(d.flip for d in draws) / 3000 - .5) < .04
    assert not any(common.draw_dsa(generator, flip=False).flip for _ in range(50))


def test_dsa_is_differentiable():
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for geometry in ("crop", "scale", "rotate"):
        changed = draw(flip=True, brightness=.1, saturation=.7, contrast=1.2, geometry=geometry, x=.3, y=-.6)
        assert torch.autograd.gradcheck(lambda x: common.dsa(x, changed), x)


def test_cutmix_pastes_the_area_it_says():
    labels = torch.arange(6)
    images = labels.view(-1, 1, 1, 1).float().expand(6, 3, 32, 32)
    generator = random_stream(0)
    fractions = []
    for _ in range(200):
        mixed, pasted, kept = common.cutmix(images, labels, generator)
        fractions.append(kept)
        own = (mixed == images).float().mean((1, 2, 3))
        foreign = pasted != labels
        assert torch.allclose(own[foreign], torch.full_like(own[foreign], kept))
        assert torch.equal(mixed[foreign].amax((1, 2, 3)), torch.maximum(labels, pasted)[foreign].float()) or kept == 1
    # Boxes are clipped at the border, so more than the half that an unclipped Beta(1, 1) keeps.
    assert min(fractions) < .2 and max(fractions) > .95 and .5 < sum(fractions) / 200 < .75


def test_imagenet_augmentation_keeps_a_constant_image_constant_in_space():
    y = common.imagenet_augment(torch.ones(4, 3, 64, 64), random_stream(0))
    assert y.flatten(2).std(2).max() < 1e-5 and y.flatten(1).std(1).max() < .2


# ---------------------------------------------------------------- training and evaluation


def reference_training(model, split, recipe, stream, mask):
    """The same training through torch.optim.SGD and MultiStepLR, without augmentation."""
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    steps = [2 * recipe.epochs // 3, 5 * recipe.epochs // 6]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=.2)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(split), generator=stream).split(recipe.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(split.images[index]), split.labels[index]).backward()
            optimizer.step()
            common.apply_mask(model, mask)
        schedule.step()


def test_training_equals_torchs_optimizer_with_masks():
    recipe = common.Recipe(6, lr=.05, batch_size=16, augment="none", cutmix=0.)
    models = [common.build_network(config(width=4, image_size=8, num_classes=3)) for _ in range(2)]
    mask = {name: torch.rand(w.shape, generator=random_stream(9)) < .5
            for name, w in common.prunable(models[0]).items()}
    for model in models:
        common.apply_mask(model, mask)
    common.train(models[0], blobs(), recipe, random_stream(3), mask)
    reference_training(models[1], blobs(), recipe, random_stream(3), mask)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(a, b, atol=2e-5)


def test_pruned_weights_are_exactly_zero_after_training():
    model = common.build_network(config(width=4, image_size=8, num_classes=3))
    mask = {name: torch.rand(w.shape, generator=random_stream(9)) < .5 for name, w in common.prunable(model).items()}
    common.train(model, blobs(), common.Recipe(3, lr=.1), random_stream(0), mask)
    for name, kept in mask.items():
        assert (model.get_parameter(name)[~kept] == 0).all() and (model.get_parameter(name)[kept] != 0).all()


def test_training_in_two_spans_is_training_in_one():
    recipe, states = common.Recipe(6, lr=.1), []
    for spans in ([(0, 6)], [(0, 2), (2, 6)]):
        model, momenta = common.build_network(config(width=8, image_size=8, num_classes=3)), None
        stream = random_stream(1)
        for span in spans:
            momenta = common.train(model, blobs(), recipe, stream, span=span, momenta=momenta).momenta
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_loss_that_is_not_finite_is_named():
    model = common.build_network(config(width=4, image_size=8, num_classes=3, norm="none"))
    with pytest.raises(UserError, match=r"epoch \d+, step \d+"):
        common.train(model, blobs(), common.Recipe(20, lr=1e6), random_stream(0))


def test_evaluation_is_the_mean_cross_entropy_and_its_standard_error():
    model, split = common.build_network(config(width=4, image_size=8, num_classes=3)), blobs(50)
    losses = F.cross_entropy(model.double()(split.images.double()), split.labels, reduction="none")
    score = common.evaluate(model.float(), split, batch_size=7)
    assert score.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert score.loss_error == pytest.approx(losses.std().item() / math.sqrt(50), rel=1e-4)


@pytest.mark.parametrize("model", ["convnet3", "resnet10"])
def test_points_are_evaluated_like_networks_of_their_own(model):
    settings, split = config(model, width=8, image_size=8, num_classes=3), blobs()
    networks = [common.build_network(settings, seed) for seed in (0, 1, 2)]
    for seed, network in enumerate(networks):
        common.train(network, blobs(seed=seed), common.Recipe(2), random_stream(seed))
    states = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]
    mask = {name: torch.rand(w.shape, generator=random_stream(9)) < .5
            for name, w in common.prunable(networks[0]).items()}
    for weights, (score,) in zip([(1, 0, 0), (.2, .5, .3)], common.evaluate_points(
            networks[0], states, [(1, 0, 0), (.2, .5, .3)], [split], mask)):
        fresh = common.build_network(settings)
        fresh.load_state_dict({k: sum(w * s[k] for w, s in zip(weights, states)) if v.is_floating_point() else v
                               for k, v in states[0].items()})
        common.apply_mask(fresh, mask)
        assert score.loss == pytest.approx(common.evaluate(fresh, split).loss, rel=1e-5)


def test_batchnorm_refresh_is_the_average_over_batches():
    norm = torch.nn.BatchNorm2d(3)
    split = blobs(60)
    common.refresh_batchnorm(torch.nn.Sequential(norm), split, batch_size=20)
    parts = split.images.split(20)
    assert torch.allclose(norm.running_mean, torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0), atol=1e-6)
    variances = torch.stack([p.transpose(0, 1).flatten(1).var(1) for p in parts])
    assert torch.allclose(norm.running_var, variances.mean(0), atol=1e-5)
    assert norm.momentum == .1 and not norm.training
