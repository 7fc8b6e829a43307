"""Real data in every form it is read from."""
import numpy as np
import pytest
import torch
from PIL import Image

from common.data import load_real
from common.errors import UserError
from common.pictures import fit


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
    train, test = load_real(settings, "unused")
    assert (len(train), len(test)) == (10, 40) and settings["num_classes"] == 4 and settings["image_size"] == 8
    assert torch.equal(test.images[3], torch.from_numpy(images[3]).permute(2, 0, 1))
    batch = test.batch(slice(0, None))[0]
    assert batch.mean((0, 2, 3)).abs().max() < 1e-3 and (batch.std((0, 2, 3)) - 1).abs().max() < 1e-3
    train, _ = load_real(dict(dataset=str(tmp_path / "folders"), image_size=8), "unused")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(train.images[1], torch.from_numpy(images[4]).permute(2, 0, 1))


def test_pictures_of_any_size_are_resized_and_cut():
    picture = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (30, 1)))  # 60 wide, 30 high
    assert fit(picture, 16).size == (16, 16)
    assert abs(np.asarray(fit(picture, 30)).mean() - 29.5) < 1  # the centre, not a squeezed whole


def test_digits_are_embedded():
    settings = dict(dataset="digits")
    train, test = load_real(settings, "no-such-folder")
    assert (len(train), len(test), train.images.shape[1:]) == (1437, 360, (1, 8, 8))
    assert settings["num_classes"] == 10 and torch.bincount(test.labels).tolist() == [36] * 10


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not a zip"])
def test_damaged_npz_is_named(tmp_path, content):
    for part in ("train", "test"):
        (tmp_path / f"{part}.npz").write_bytes(content)
    with pytest.raises(UserError, match="train.npz"):
        load_real(dict(dataset=str(tmp_path)), "unused")
