"""Distilled sets of every published format, and their tiles."""
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.data import DATASETS
from common.distilled import decode_tiles, load_distilled, neighbour_correlation
from common.errors import UserError
from common.streams import random_stream
from common.training import Recipe, train
from samples import write_pictures

CIFAR = DATASETS["cifar10"]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def stored():
    """Three images a class in [0, 1], levels of 8 bits, in an order of their own, and their labels."""
    levels = torch.randint(256, (30, 3, 32, 32), generator=random_stream(1))
    return levels / 255, torch.arange(10).repeat_interleave(3)[torch.randperm(30, generator=random_stream(2))]


def normalised(images):
    return (images - torch.tensor(CIFAR.mean).view(3, 1, 1)) / torch.tensor(CIFAR.std).view(3, 1, 1)


def expected(images, labels):
    """What is loaded of raw images: normalised and sorted by class."""
    order = labels.argsort(stable=True)
    return normalised(images)[order], labels[order]


#############################################
#             Layouts and values            #
#############################################

VALUES = {
    "unit": lambda x: x, "to 255": lambda x: x * 255, "double": lambda x: x.double(), "half": lambda x: x.half(),
    "bytes": lambda x: (x * 255).round().byte(), "brain": lambda x: (x * 255).round().bfloat16(),
    "long": lambda x: (x * 255).round().long(), "with gradients": lambda x: x.clone().requires_grad_(),
    "normalised": normalised, "normalised double": lambda x: normalised(x.double()),
}
LABELS = {
    "numbers": lambda y: y, "column": lambda y: y[:, None], "floats": lambda y: y.float(), "bytes": lambda y: y.byte(),
    "one-hot": lambda y: F.one_hot(y, 10), "targets": lambda y: F.one_hot(y, 10) - .1,
    "learned targets": lambda y: F.one_hot(y, 10) - .1 + .3 * torch.rand(len(y), 10, generator=random_stream(3)),
}
LAYOUTS = {
    "first": lambda x: x, "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "last": lambda x: x.permute(0, 2, 3, 1).contiguous(), "strided": lambda x: x.permute(0, 2, 3, 1),
}


def array(tensor):
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor.detach()).numpy()


def keep(folder, container, images, labels):
    """Write a set in a format; returns the path to load."""
    path = folder / "set.pt"
    if container == "list":
        torch.save([images, labels], path)
    elif container == "DSA":
        accuracies = {"ConvNet": [np.float64(.51), np.float32(.5), np.int64(3)]}
        torch.save({"data": [[images.detach() * 0, labels], [images, labels]], "accs_all_exps": accuracies}, path)
    elif container == "dict":
        torch.save({"image": images, "label": labels, "args": {"lr": 1}}, path)
    elif container == "arrays in a list":
        torch.save((array(images), array(labels)), path)
    elif container == "MTT":
        torch.save(images, folder / "images_500.pt")
        torch.save(labels, folder / "labels_500.pt")
        return folder
    elif container == "MTT's labels":
        return keep(folder, "MTT", images, labels) / "labels_500.pt"
    elif container == "npz":
        np.savez(folder / "set.npz", images=array(images), labels=array(labels))
        return (folder / "set.npz").rename(folder / "set")  # known by content
    elif container == "npy":
        np.save(folder / "x.npy", array(images))
        np.save(folder / "labels.npy", array(labels))
        return folder / "x.npy"
    return path


CONTAINERS = ["list", "DSA", "dict", "arrays in a list", "MTT", "MTT's labels", "npz", "npy"]


@pytest.mark.parametrize("seed", range(40))
def test_every_format_with_every_kind_of_values_and_labels(tmp_path, stored, seed):
    draw = random.Random(seed)
    values, labels, layout = draw.choice(list(VALUES)), draw.choice(list(LABELS)), draw.choice(list(LAYOUTS))
    held = LAYOUTS[layout](VALUES[values](stored[0])), LABELS[labels](stored[1])
    path = keep(tmp_path, CONTAINERS[seed % len(CONTAINERS)], *held)
    split, (images, numbers) = load_distilled(path, CIFAR, 3), expected(*stored)
    assert torch.equal(split.labels, numbers), labels
    assert (split.images - images).abs().max() < (1e-2 if values == "half" else 1e-5), (values, layout)
    assert split.images.dtype == torch.float32 and not split.images.requires_grad


def test_sets_without_labels_are_sorted_by_class(tmp_path, stored, capsys):
    torch.save([normalised(stored[0]).permute(0, 2, 3, 1)], tmp_path / "kip.pt")
    split = load_distilled(tmp_path / "kip.pt", CIFAR, 3)
    assert torch.allclose(split.images, normalised(stored[0]), atol=1e-5)
    assert torch.equal(split.labels, torch.arange(10).repeat_interleave(3)) and "no labels" in capsys.readouterr().err


def test_pictures_in_class_folders_and_contact_sheets(tmp_path, stored):
    images, labels = (stored[0] * 255).round().byte(), stored[1].sort()[0]
    sheet = images.reshape(10, 3, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(320, 96, 3).numpy()
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    write_pictures(tmp_path / "set", [Image.fromarray(x).convert("RGBA") for x in arrays], labels.tolist(), parts=("",))
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    for path in (tmp_path / "sheet.png", tmp_path / "set"):
        assert torch.allclose(load_distilled(path, CIFAR, 3).images, normalised(stored[0]), atol=1e-5), path


def test_of_several_pairs_the_best_is_taken_or_none(tmp_path, stored):
    for name in ("100", "best", "200"):
        torch.save(stored[0] if name == "best" else stored[0] * 0, tmp_path / f"images_{name}.pt")
        torch.save(stored[1], tmp_path / f"labels_{name}.pt")
    assert torch.allclose(load_distilled(tmp_path, CIFAR, 3).images, expected(*stored)[0], atol=1e-5)
    (tmp_path / "labels_best.pt").unlink()
    with pytest.raises(UserError, match="images_100.pt, images_200.pt; give the path of one"):
        load_distilled(tmp_path, CIFAR, 3)
    with pytest.raises(UserError, match="images_best.pt: holds float32 30 x 3 x 32 x 32 alone; wanted"):
        load_distilled(tmp_path / "images_best.pt", CIFAR, 3)


def test_what_lies_beside_images_and_labels_is_named(tmp_path, stored, capsys):
    images, labels = stored
    soft = F.one_hot(labels, 10) * .9
    torch.save({"images": images, "labels": labels, "soft_labels": soft, "lr": torch.tensor(.1)}, tmp_path / "a.pt")
    torch.save([images, labels, soft], tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", images=images, labels=labels, images_ema=images)
    for name, beside in (("a.pt", "soft_labels"), ("b.pt", "2"), ("c.npz", "images_ema")):
        load_distilled(tmp_path / name, CIFAR, 3)
        assert f"left out: {beside}\n" in capsys.readouterr().err


def test_soft_labels_stay_soft_and_train(tmp_path, stored):
    shares = (4 * F.one_hot(stored[1], 10) + torch.rand(30, 10, generator=random_stream(5))).softmax(1)
    torch.save([stored[0], shares], tmp_path / "data.pt")
    split = load_distilled(tmp_path / "data.pt", CIFAR, 3, factor=2)
    order = stored[1].argsort(stable=True)
    assert split.labels.shape == (120, 10)
    assert torch.equal(split.labels.argmax(1), torch.arange(10).repeat_interleave(12))
    assert torch.equal(split.labels[:3], shares[order][:3])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    train(model, split, Recipe(1, augment="none", cutmix=1.), random_stream(0))


#############################################
#                  Refusals                 #
#############################################

WRONG = {
    "smaller": (lambda x, y: [x[:, :, :16, :16], y], "16 x 16"), "empty": (lambda x, y: [x[:0], y[:0]], "0 images"),
    "too few": (lambda x, y: [x[:27], y[:27]], "images? .*--ipc 3"),
    "of one": (lambda x, y: [x[:10], torch.arange(10)], "holds 1 images a class, expected --ipc 3"),
    "unequal": (lambda x, y: [x, torch.cat([y[1:], (y[:1] + 1) % 10])], "images a class, expected --ipc 3"),
    "other labels": (lambda x, y: [x, y + 1], "labels go from 1 to 10"),
    "negative": (lambda x, y: [x, y - 1], "labels go from -1"),
    "a gap": (lambda x, y: [x, y.clamp(max=8)], "no image of class 9"),
    "more images": (lambda x, y: [x, y[1:]], "labels are 29"), "half": (lambda x, y: [x, y + .5], "whole"),
    "fewer classes": (lambda x, y: [x, F.one_hot(y, 10)[:, :9]], "30 x 9"),
    "no number": (lambda x, y: [x, y * math.nan], "not finite"),
    "one label": (lambda x, y: [x, torch.tensor(3)], "one number"),
    "not finite": (lambda x, y: [x * math.nan, y], "not finite"), "[-1, 1]": (lambda x, y: [2 * x - 1, y], "-1 to 1"),
    "signed": (lambda x, y: [(x * 255 - 128).to(torch.int8), y], "from -128"),
    "percent": (lambda x, y: [x * 100, y], "0 to 100"), "16 bits": (lambda x, y: [x * 65535, y], "to 65535"),
    "far": (lambda x, y: [normalised(x) * 30, y], "wanted"), "constant": (lambda x, y: [x * 0, y], "all values"),
    "double": (lambda x, y: [x.double() * 1e300, y], "wanted"), "complex": (lambda x, y: [x + 0j, y], "numbers"),
    "sparse": (lambda x, y: [x.to_sparse(), y], "sparse_coo"), "meta": (lambda x, y: [x.to("meta"), y], "known format"),
    "one value": (lambda x, y: [torch.tensor(3.), y], "images are"), "text": (lambda x, y: ["images", "labels"], "str"),
    "weights": (lambda x, y: {"weights": x}, "known format"), "nothing": (lambda x, y: [], r"holds \[\]"),
    "none": (lambda x, y: None, "NoneType"), "no data": (lambda x, y: {"data": []}, "known format"),
    "strange data": (lambda x, y: {"data": 3}, "known format"),
    "huge": (lambda x, y: [x[:1].expand(10 ** 9, -1, -1, -1), y], "labels are 30"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_distilled_sets_are_named(tmp_path, stored, name):
    change, message = WRONG[name]
    torch.save(change(*stored), tmp_path / "data.pt")
    with pytest.raises(UserError, match=message) as refused:
        load_distilled(tmp_path / "data.pt", CIFAR, 3)
    assert "data.pt" in str(refused.value) and "\n" not in str(refused.value)


FACTORS = (0, -1, None, [2], "2", 2.5, True, 17, 10 ** 30, {})


@pytest.mark.parametrize("settings", ["[1]", "3", "null", "{", ""] + [json.dumps({"factor": x}) for x in FACTORS])
def test_a_strange_file_of_settings_is_named(tmp_path, stored, settings):
    torch.save([*stored], tmp_path / "data.pt")
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises(UserError, match="config.json"):
        load_distilled(tmp_path / "data.pt", CIFAR, 3)
    assert len(load_distilled(tmp_path / "data.pt", CIFAR, 3, factor=2)) == 120
    with pytest.raises(UserError, match="--factor 17: wanted"):
        load_distilled(tmp_path / "data.pt", CIFAR, 3, factor=17)


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_file_is_refused_in_one_line(tmp_path, stored, seed):
    path, draw = keep(tmp_path, ("list", "npz", "npy")[seed % 3], *stored), random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 20))):
        content[draw.randrange(min(len(content), 2000))] = draw.randrange(256)
    path.write_bytes(content[:draw.choice((len(content), draw.randrange(len(content))))])
    try:
        load_distilled(path, CIFAR, 3)
    except UserError as error:
        assert path.name in str(error)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ("pipe", "a pipe"), ("nothing", "no such file"), ("", "neither class folders nor a file"):
        with pytest.raises(UserError, match=message):
            load_distilled(tmp_path / path, CIFAR, 3)


def test_whitened_sets_are_warned_about(tmp_path, capsys):
    """Noise smoothed until neighbours correlate like those of natural, of whitened and of no images."""
    noise = torch.randn(40, 3, 40, 40, generator=random_stream(1))
    for share, whitened in (0., False), (.25, True), (1., False):
        kernel = torch.tensor([share, 1, share])
        smooth = F.conv2d(noise.view(120, 1, 40, 40), torch.outer(kernel, kernel)[None, None]).view(40, 3, 38, 38)
        smooth = F.avg_pool2d(smooth, 3, 1) if share == 1 else smooth
        images = smooth[:, :, :32, :32] / smooth.std()
        torch.save([images, torch.arange(10).repeat_interleave(4)], tmp_path / "res.pt")
        load_distilled(tmp_path / "res.pt", CIFAR, 4)
        assert ("ZCA" in capsys.readouterr().err) == whitened, neighbour_correlation(images)


#############################################
#                   Tiles                   #
#############################################


def test_tiles_are_cut_row_by_row_and_resized():
    tiles = torch.tensor([1., 2., 3., 4.])
    image = torch.empty(1, 1, 8, 8)
    for k, value in enumerate(tiles):
        image[:, :, k // 2 * 4:k // 2 * 4 + 4, k % 2 * 4:k % 2 * 4 + 4] = value
    decoded, labels = decode_tiles(torch.cat([image, 10 * image]), torch.tensor([0, 1]), 2)
    assert decoded.shape == (8, 1, 8, 8) and labels.tolist() == [0] * 4 + [1] * 4
    assert torch.allclose(decoded[:, 0].flatten(1).mean(1), torch.cat([tiles, 10 * tiles]))
    assert decoded[0].std() == 0


def test_tiles_of_a_size_that_does_not_divide_are_padded_with_grey():
    decoded, _ = decode_tiles(torch.zeros(1, 1, 8, 8), torch.tensor([0]), 3)  # tiles of ceil(8/3) = 3 pixels
    expected = torch.zeros(9, 9)
    expected[8:], expected[:, 8:] = .5, .5
    last = F.interpolate(expected[None, None, 6:, 6:], size=(8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(decoded[8], last[0])


@pytest.mark.skipif(not SHARED.exists(), reason="published sets are not at hand")
@pytest.mark.parametrize("name, ipc", [("mtt_cifar10_ipc1", 1), ("mtt_cifar10_ipc10", 10), ("mtt_cifar10_ipc50", 50),
                                       ("dc_cifar10_ipc10.pt", 10)])
def test_published_sets(name, ipc):
    split = load_distilled(SHARED / "distilled" / name, CIFAR, ipc)
    assert split.images.shape == (10 * ipc, 3, 32, 32) and .8 < split.images.std() < 1.4
