"""Real data in every form it is read from: what is clear is read, what is not is refused, surprises are named."""
import os
import random
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.data import DATASETS, Dataset, load_real
from common.distilled import load_distilled
from common.errors import UserError, plain
from common.pictures import fit
from samples import write_pictures


def pictures(n=40, size=8, channels=3, seed=0):
    """uint8 [n, size, size, channels] of all values, and labels of four classes in an order of their own."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    images[0, 0, 0], images[-1, -1, -1] = 0, 255
    return images, rng.permutation(np.arange(n) % 4)


def save(folder, images, labels, keys=("images", "labels")):
    """The same images as training and test set."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", **dict(zip(keys, (images, labels))))
    return folder


def load(folder, **settings):
    return load_real(dict(dataset=str(folder), **settings), "unused")


#############################################
#                Arrays                     #
#############################################

IMAGES = {
    "bytes": lambda x: x, "long integers": lambda x: x.astype(np.int64), "big-endian": lambda x: x.astype(">i4"),
    "floats to 255": lambda x: x.astype(np.float64), "unit": lambda x: x / np.float32(255),
    "half": lambda x: (x / 255).astype(np.float16), "slightly beyond": lambda x: x / 255 * 1.0005,
    "16 bits": lambda x: x.astype(np.uint16) * 257, "16 bits with noise": lambda x: x.astype(np.uint16) * 256 + 99,
}
LABELS = {
    "numbers": lambda y: y, "column": lambda y: y[:, None], "floats": lambda y: y.astype(np.float32),
    "bytes": lambda y: y.astype(np.uint8), "one-hot": lambda y: np.eye(4)[y],
    "one-hot bool": lambda y: np.eye(4)[y] > 0, "text": lambda y: np.array(["ant", "Bee", "cat", "d"])[y],
    "digits": lambda y: np.array(["2", "9", "10", "11"])[y],
    "byte strings": lambda y: np.array([b"a", b"b", b"c", b"d"])[y],
}
KEYS = [("images", "labels"), ("X", "y"), ("x_train", "y_train"), ("data", "targets"), ("arr_0", "arr_1")]


@pytest.mark.parametrize("seed", range(30))
def test_every_clear_layout_is_read_alike(tmp_path, seed):
    draw = random.Random(seed)
    channels = draw.choice((1, 3))
    images, labels = pictures(size=draw.choice((5, 8)), channels=channels, seed=seed)
    layout = draw.choice(["last", "first"] + ["none"] * (channels == 1))
    kept = {"last": images, "first": images.transpose(0, 3, 1, 2), "none": images[..., 0]}[layout]
    kind, name, keys = draw.choice(list(IMAGES)), draw.choice(list(LABELS)), draw.choice(KEYS)
    order = {"text": [1, 0, 2, 3]}.get(name, range(4))  # capitals come first
    held = IMAGES[kind](kept), LABELS[name](labels)
    if keys[0] == "x_train":
        np.savez(tmp_path / "own.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), held * 2)))
        train, test = load(tmp_path / "own.npz")
    else:
        train, test = load(save(tmp_path, *held, keys))
    wanted = torch.from_numpy(images).permute(0, 3, 1, 2)
    close = 1 if kind in ("half", "slightly beyond") else 0
    assert (train.images.int() - wanted.int()).abs().max() <= close, (kind, layout)
    numbers = [list(order).index(label) for label in labels]
    assert train.labels.tolist() == test.labels.tolist() == numbers, name
    assert torch.equal(train.images, test.images) and train.images.dtype == torch.uint8


UNCLEAR = {
    "not square": lambda x, y: (np.pad(x, ((0, 0), (0, 0), (0, 2), (0, 0))), y),
    "four channels": lambda x, y: (x.repeat(2, 3)[..., :4], y), "three by three": lambda x, y: (x[:, :3, :3], y),
    "rows": lambda x, y: (x.reshape(40, -1), y), "none": lambda x, y: (x[:0], y[:0]),
    "normalised": lambda x, y: ((x - 100.) / 50, y), "percent": lambda x, y: (x / 2.56, y),
    "signed": lambda x, y: (x.astype(np.int8), y), "12 of 16 bits": lambda x, y: (x.astype(np.uint16) * 16, y),
    "12 of 32 bits": lambda x, y: (x.astype(np.int32) * 16, y),
    "not finite": lambda x, y: (np.where(x > 250, np.nan, x), y),
    "infinite": lambda x, y: (np.where(x > 250, np.inf, x), y), "complex": lambda x, y: (x + 0j, y),
    "text": lambda x, y: (x.astype(str), y), "constant": lambda x, y: (x * 0, y),
    "objects": lambda x, y: (x, y.astype(object)), "too few": lambda x, y: (x, y[1:]),
    "from one": lambda x, y: (x, y + 1), "negative": lambda x, y: (x, y - 1),
    "a gap": lambda x, y: (x, np.where(y == 1, 0, y)), "half labels": lambda x, y: (x, y + .5),
    "no number": lambda x, y: (x, np.where(y, np.nan, 0)), "huge": lambda x, y: (x, y * 10 ** 15),
    "unsigned": lambda x, y: (x, y.astype(np.uint64) * 2 ** 62), "two of them": lambda x, y: (x, np.stack([y, y], 1)),
    "soft": lambda x, y: (x, np.full((40, 4), .25)), "one label": lambda x, y: (x, np.array(3)),
    "cube": lambda x, y: (x, y[:, None, None]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="train.npz|labels|class") as refused:
        load(save(tmp_path, *UNCLEAR[name](*pictures())))
    assert plain(refused.value) == str(refused.value)


def test_parts_in_different_ranges_are_refused(tmp_path):
    images, labels = pictures()
    np.savez(tmp_path / "own.npz", x_train=images / 255, y_train=labels, x_test=images / 1., y_test=labels)
    with pytest.raises(UserError, match="to 1 in one part and to 255 in another"):
        load(tmp_path / "own.npz")


def test_wrong_names_are_named_with_what_they_hold(tmp_path):
    save(tmp_path, *pictures(), keys=("pictures", "labels"))
    with pytest.raises(UserError, match="pictures uint8 40 x 8 x 8 x 3, labels int64 40; wanted images"):
        load(tmp_path)


def test_text_is_numbered_over_both_parts_and_test_classes_are_those_of_training(tmp_path, capsys):
    images, labels = pictures()
    for part, names in ("train", "abcd"), ("test", "bbcd"):
        np.savez(tmp_path / f"{part}.npz", images=images, labels=np.array(list(names))[labels])
    train, test = load(tmp_path)
    assert train.labels.tolist() == labels.tolist() and test.labels.tolist() == np.maximum(labels, 1).tolist()
    assert "no test image of class 0" in capsys.readouterr().err
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    np.savez(tmp_path / "train.npz", images=images, labels=labels % 3)
    with pytest.raises(UserError, match="test labels reach 3"):
        load(tmp_path)


def test_one_file_of_all_parts_leaves_out_the_validation_set_and_says_so(tmp_path, capsys):
    images, labels = pictures()
    members = {f"{part}_{what}": array for part in ("train", "val", "test")
               for what, array in (("images", images), ("labels", labels[:, None]))}
    np.savez(tmp_path / "own.npz", **members)
    settings = dict(dataset=str(tmp_path / "own.npz"))
    train, _ = load_real(settings, "unused")
    out, err = capsys.readouterr()
    assert torch.equal(train.labels, torch.from_numpy(labels)) and settings["dataset"] == "own.npz"
    assert "left out: val_images, val_labels" in err
    assert out.startswith("train: 40 images of 3 x 8 x 8 in 4 classes, 10 each\n")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not a zip"])
def test_damaged_npz_is_named(tmp_path, content):
    for part in ("train", "test"):
        (tmp_path / f"{part}.npz").write_bytes(content)
    with pytest.raises(UserError, match="train.npz"):
        load(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_npz_is_read_right_or_refused(tmp_path, seed):
    save(tmp_path, *pictures())
    content, draw = bytearray((tmp_path / "train.npz").read_bytes()), random.Random(seed)
    for _ in range(draw.choice((1, 4, 100))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    (tmp_path / "train.npz").write_bytes(content[:draw.choice((len(content), draw.randrange(len(content))))])
    try:
        train, _ = load(tmp_path)
    except UserError:
        return
    assert torch.equal(train.images, torch.from_numpy(pictures()[0]).permute(0, 3, 1, 2))


def test_unused_members_cost_nothing_and_claims_are_checked(tmp_path):
    """Nothing is allocated for what a header says alone."""
    save(tmp_path, *pictures())
    with zipfile.ZipFile(tmp_path / "train.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("unused.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(2 ** 62,)))
        archive.writestr("broken.npy", b"no array")
    assert len(load(tmp_path)[0]) == 40
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        for name in ("images", "labels"):
            with archive.open(f"{name}.npy", "w") as file:
                head = dict(descr="|u1", fortran_order=False, shape=(2 ** 40, 8, 8))
                np.lib.format.write_array_header_1_0(file, head)
    with pytest.raises(UserError, match="claims to be uint8 1099511627776 x 8 x 8, but holds"):
        load(tmp_path)


#############################################
#                 Pictures                  #
#############################################


def test_npz_class_folders_and_subset(tmp_path):
    images, labels = pictures()
    save(tmp_path / "arrays", images, labels)
    write_pictures(tmp_path / "folders", images[:8], [f"class{label}" for label in labels[:8]])
    settings = dict(dataset=str(tmp_path / "arrays"), train_images=10)
    train, test = load_real(settings, "unused")
    assert (len(train), len(test)) == (10, 40) and settings["num_classes"] == 4 and settings["image_size"] == 8
    assert torch.equal(test.images[3], torch.from_numpy(images[3]).permute(2, 0, 1))
    batch = test.batch(slice(0, None))[0]
    assert batch.mean((0, 2, 3)).abs().max() < 1e-3 and (batch.std((0, 2, 3)) - 1).abs().max() < 1e-3
    train, _ = load(tmp_path / "folders")
    order = np.argsort(labels[:8], kind="stable")
    assert train.labels.tolist() == labels[order].tolist()
    assert torch.equal(train.images, torch.from_numpy(images[order]).permute(0, 3, 1, 2))


NATURAL = ["7", "10.5", "12", "class2", "class10", "dog", "n01", "with space", "Über"]


@pytest.mark.parametrize("seed", range(10))
def test_every_picture_of_random_trees_is_read_and_junk_is_named(tmp_path, seed, capsys):
    draw = random.Random(seed)
    names = [NATURAL[i] for i in sorted(draw.sample(range(len(NATURAL)), 4))]
    images, _ = pictures(24, channels=draw.choice((1, 3)), seed=seed)
    for part in ("train", draw.choice(("val", "valid", "validation", "test"))):
        for i, image in enumerate(images):
            suffix = draw.choice((".png", ".PNG", ".bmp", ".tif", ".TIFF", ".ppm" if image.shape[2] == 3 else ".pgm"))
            folder = tmp_path / part / names[i % 4] / draw.choice(("", "images", "more/deep"))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(folder / f"{i}{suffix}")
        for junk in (".ipynb_checkpoints", "__MACOSX", ".DS_Store", "Thumbs.db"):
            (tmp_path / part / junk).mkdir()
        (tmp_path / part / names[0] / ".hidden.png").write_bytes(b"none")
        (tmp_path / part / names[0] / "notes.txt").write_bytes(b"none")
        (tmp_path / part / "empty").mkdir()
    for part in load(tmp_path):
        read = [(image.permute(1, 2, 0).numpy().tobytes(), int(c)) for image, c in zip(part.images, part.labels)]
        assert sorted(read) == sorted((image.tobytes(), i % 4) for i, image in enumerate(images))
    err = capsys.readouterr().err
    assert "no pictures, left out: 2" in err and "no classes: 2" in err and "hidden" not in err


def test_a_class_of_one_part_alone_is_refused(tmp_path):
    images, labels = pictures()
    write_pictures(tmp_path, images, labels)
    for file in (tmp_path / "train" / "2").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="train: no pictures of class 2, which val has"):
        load(tmp_path)


def test_sixteen_bits_palettes_and_transparency(tmp_path, capsys):
    """16-bit levels are kept apart, a palette gives its colours, and transparent parts lie on white."""
    levels = np.arange(17).repeat(4)[:64].reshape(8, 8)
    deep = Image.fromarray((levels * 16 * 256 + 7).astype(np.uint16))
    write_pictures(tmp_path / "deep", [deep] * 4, [0, 0, 1, 1])
    train, _ = load(tmp_path / "deep")
    assert train.images.shape == (4, 1, 8, 8) and torch.equal(train.images[0, 0], torch.from_numpy(levels * 16).byte())
    assert "16 bits" in capsys.readouterr().err
    colours = Image.fromarray(pictures(1)[0][0]).convert("P", palette=Image.Palette.ADAPTIVE)
    clear = np.dstack([pictures(1)[0][0], np.full((8, 8), 255, np.uint8)])
    clear[:4, :, 3] = 0
    shares = [colours, Image.fromarray(clear), Image.fromarray(levels.astype(np.uint8) * 15)]
    write_pictures(tmp_path / "colours", shares, [0, 0, 1])
    train, _ = load(tmp_path / "colours")
    assert torch.equal(train.images[0], torch.from_numpy(np.array(colours.convert("RGB"))).permute(2, 0, 1))
    assert (train.images[1, :, :4] == 255).all()
    assert torch.equal(train.images[1, :, 4:], torch.from_numpy(clear[4:, :, :3]).permute(2, 0, 1))
    assert (train.images[2] == train.images[2, :1]).all()
    assert "transparent parts, laid on white: 2" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_a_turned_camera_are_upright(tmp_path, orientation, capsys):
    image = Image.fromarray(pictures(1)[0][0])
    tag = Image.Exif()
    tag[0x0112] = orientation
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            image.save(tmp_path / part / name / "x.png", exif=tag)
    image.save(tmp_path / "x.png", exif=tag)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    train, _ = load(tmp_path)
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), np.asarray(upright))
    assert ("turned upright: 4" in capsys.readouterr().err) == (orientation > 1)


def test_a_second_set_to_test_on_and_dark_pictures_of_16_bits_are_named(tmp_path, capsys):
    dark = Image.fromarray((pictures(1, channels=1)[0][0, ..., 0].astype(np.uint16) * 16))
    write_pictures(tmp_path, [dark, dark], [0, 1], parts=("train", "val", "test"))
    load(tmp_path)
    err = capsys.readouterr().err
    assert "tested on val; left out: test" in err and "nearly black" in err


def test_pictures_of_any_size_are_resized_and_cut():
    picture = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (30, 1)))  # 60 wide, 30 high
    assert fit(picture, 16).size == (16, 16)
    assert abs(np.asarray(fit(picture, 30)).mean() - 29.5) < 1  # the centre, not a squeezed whole


def test_sizes_are_found_or_asked_for(tmp_path, capsys):
    images, labels = pictures()
    write_pictures(tmp_path / "alike", images, labels)
    assert load(tmp_path / "alike")[0].images.shape[2:] == (8, 8)
    assert load(tmp_path / "alike", image_size=12)[0].images.shape[2:] == (12, 12)
    assert "resized to 12 x 12" in capsys.readouterr().err
    write_pictures(tmp_path / "mixed", [*images[:39], np.zeros((9, 5, 3), np.uint8)], labels)
    with pytest.raises(UserError, match="8 x 8, 5 x 9 pixels; --image-size"):
        load(tmp_path / "mixed")
    with pytest.raises(UserError, match="from 1 to 1024"):
        load(tmp_path / "alike", image_size=10 ** 5)
    save(tmp_path / "arrays", images, labels)
    with pytest.raises(UserError, match="wanted 12 x 12"):
        load(tmp_path / "arrays", image_size=12)


def test_tiny_imagenets_own_layout(tmp_path):
    images, labels = pictures()
    names = [f"n0{9 - label}" for label in labels]
    for i, (image, name) in enumerate(zip(images, names)):
        folder = tmp_path / "train" / name / "images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}_{i}.png")
    (tmp_path / "val" / "images").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "val" / "images" / f"val_{i}.png")
    rows = [f"val_{i}.png\t{name}\t0\t0\t7\t7\n" for i, name in enumerate(names)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    truth = {image.tobytes(): 3 - label for image, label in zip(images, labels)}
    for part in load(tmp_path):
        assert len(part) == 40
        assert all(truth[x.permute(1, 2, 0).numpy().tobytes()] == y for x, y in zip(part.images, part.labels))


def test_a_known_order_of_classes_holds_for_real_and_distilled_folders(tmp_path):
    names = ("n02869837 n01749939 n02488291 n02107142 n13037406 "
             "n02091831 n04517823 n04589890 n03062245 n01773797").split()
    images = pictures(size=16)[0][:10]
    write_pictures(tmp_path / "imagenet10", images, names)
    write_pictures(tmp_path / "set", images, names, parts=("",))
    train, _ = load(tmp_path / "imagenet10", image_size=16)
    own = Dataset(3, 16, 10, train.mean, train.std)
    distilled = load_distilled(tmp_path / "set", own, 1)
    assert train.labels.tolist() == list(range(10))
    assert torch.equal(train.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.allclose(distilled.images, train.batch(slice(0, 10))[0], atol=1e-5)


@pytest.mark.parametrize("trap, message", [
    (lambda file: Image.new("1", (10_000, 10_000)).save(file), "more than 89,478,485 pixels"),
    (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n cut"), "not a readable picture"),
    (lambda file: Image.new("L", (1, 3000)).save(file), "no picture"),
    (lambda file: Image.new("F", (8, 8)).save(file.with_suffix(".tif")), "32 bits")])
def test_broken_and_monstrous_pictures_are_refused(tmp_path, trap, message):
    images, labels = pictures()
    write_pictures(tmp_path, images, labels)
    trap(tmp_path / "train" / "1" / "trap.png")
    with pytest.raises(UserError, match=message):
        load(tmp_path, image_size=8)


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    images, labels = pictures()
    write_pictures(tmp_path, images, labels)
    os.mkfifo(tmp_path / "train" / "1" / "pipe.png")
    assert len(load(tmp_path)[0]) == 40 and "pipes, devices and dead links, left out: 1" in capsys.readouterr().err
    os.mkfifo(tmp_path / "train.npz")
    assert len(load(tmp_path)[0]) == 40


#############################################
#                 Identity                  #
#############################################


def test_data_is_known_by_its_content_wherever_it_lies(tmp_path):
    images, labels = pictures()
    first = dict(dataset=str(save(tmp_path / "a" / "own", images, labels)))
    load_real(first, "unused")
    assert first["dataset"] == "own" and len(first["data_fingerprint"]) == 16
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "own").rename(tmp_path / "b" / "own")
    with pytest.raises(UserError, match="unknown dataset 'own'"):
        load_real(dict(first), tmp_path / "a")
    moved = dict(first)
    assert len(load_real(moved, tmp_path / "b")[0]) == 40 and moved == first
    (tmp_path / "b" / "own").rename(tmp_path / "b" / "renamed")
    assert len(load_real(dict(first), tmp_path / "b")[0]) == 40
    assert len(load_real(first | {"dataset": str(tmp_path / "b" / "renamed")}, "unused")[0]) == 40


@pytest.mark.parametrize("seed", range(5))
def test_other_data_in_the_same_place_is_refused(tmp_path, seed):
    images, labels = pictures()
    config = dict(dataset=str(save(tmp_path / "own", images, labels)))
    load_real(config, "unused")
    place = np.random.default_rng(seed).integers(images.size)
    images.reshape(-1)[place] ^= 1
    save(tmp_path / "own", images, labels)
    with pytest.raises(UserError, match=f"other data .fingerprint [0-9a-f]{{16}}.*{config['data_fingerprint']}"):
        load_real(dict(config), tmp_path)


def test_a_known_dataset_is_the_same_by_name_and_by_path(tmp_path):
    digits, _ = load_real(dict(dataset="digits"), "unused")
    save(tmp_path / "digits", digits.images.permute(0, 2, 3, 1).numpy(), digits.labels.numpy())
    train, _ = load(tmp_path / "digits")
    assert train.mean == DATASETS["digits"].mean and torch.equal(train.images, digits.images)
    save(tmp_path / "digits", *pictures())
    with pytest.raises(UserError, match="but digits has 1 x 8 x 8 in 10; other data needs another name"):
        load(tmp_path / "digits")


def test_digits_are_embedded():
    settings = dict(dataset="digits")
    train, test = load_real(settings, "no-such-folder")
    assert (len(train), len(test), train.images.shape[1:]) == (1437, 360, (1, 8, 8))
    assert settings["num_classes"] == 10 and torch.bincount(test.labels).tolist() == [36] * 10


@pytest.mark.parametrize("path", ["", "/", "no/such", "x" * 300, "\0", "/dev/zero", "~", "cifar11"])
def test_what_is_no_dataset_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="dataset"):
        load_real(dict(dataset=path), "no-such-folder")
