"""Distilled sets of every published format, and their tiles."""
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.data import DATASETS
from common.distilled import decode_tiles, load_distilled
from common.errors import UserError
from common.streams import random_stream

CIFAR = DATASETS["cifar10"]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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
        split = load_distilled(tmp_path / name, CIFAR, ipc=3)
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
        assert torch.allclose(load_distilled(path, CIFAR, 3).images, normalised(images / 255), atol=1e-5), path


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


@pytest.mark.parametrize("change, message", [
    (lambda x, y: [x[:, :, :16, :16], y], "16 x 16"), (lambda x, y: [x[:29], y[:29]], "--ipc 3"),
    (lambda x, y: [x * math.nan, y], "not finite"), (lambda x, y: {"weights": x}, "known format")])
def test_wrong_distilled_sets_are_named(tmp_path, stored, change, message):
    torch.save(change(*stored), tmp_path / "data.pt")
    with pytest.raises(UserError, match=message):
        load_distilled(tmp_path / "data.pt", CIFAR, 3)


def test_whitened_set_is_warned_about(tmp_path, stored, capsys):
    torch.save({"data": [[torch.randn(30, 3, 32, 32) * .55, stored[1]]]}, tmp_path / "res.pt")
    load_distilled(tmp_path / "res.pt", CIFAR, 3)
    assert "ZCA" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.exists(), reason="published sets are not at hand")
@pytest.mark.parametrize("name, ipc", [("mtt_cifar10_ipc1", 1), ("mtt_cifar10_ipc10", 10), ("mtt_cifar10_ipc50", 50),
                                       ("dc_cifar10_ipc10.pt", 10)])
def test_published_sets(name, ipc):
    split = load_distilled(SHARED / "distilled" / name, CIFAR, ipc)
    assert split.images.shape == (10 * ipc, 3, 32, 32) and .8 < split.images.std() < 1.4
