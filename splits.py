"""Data as splits, in memory: real datasets, and distilled sets of every published format."""
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import Split, UserError, load, random_stream
from ranks import together, wait

HERE = Path(__file__).resolve().parent

#############################################
#                 Real data                 #
#############################################


class Dataset(NamedTuple):
    channels: int
    image_size: int
    num_classes: int
    mean: tuple
    std: tuple
    train_size: int = 0
    flip: bool = True


CIFAR = (.4914, .4822, .4465), (.2023, .1994, .2010)  # IDC's values
DATASETS = {
    "cifar10": Dataset(3, 32, 10, *CIFAR, 50_000),
    "cifar100": Dataset(3, 32, 100, *CIFAR, 50_000),
    "svhn": Dataset(3, 32, 10, (.4377, .4438, .4728), (.1980, .2010, .1970), 73_257, flip=False),
    "mnist": Dataset(1, 28, 10, (.1307,), (.3081,), 60_000, flip=False),
    "fashion": Dataset(1, 28, 10, (.2861,), (.3530,), 60_000),
    "imagenet10": Dataset(3, 224, 10, (.485, .456, .406), (.229, .224, .225), 13_000),
    "digits": Dataset(1, 8, 10, (.3063,), (.3769,), 1_437, flip=False),
}
IMAGENET10 = ("n02869837 n01749939 n02488291 n02107142 n13037406 "
              "n02091831 n04517823 n04589890 n03062245 n01773797").split()
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


def load_real(config, data_dir, device="cpu"):
    """(train, test) splits of config["dataset"]; fills in the config's channels, image_size, num_classes, flip.

    Looked for in order: <data_dir>/<dataset>/{train,test}.npz (images uint8 NHWC, labels), class folders
    <dataset>/{train,val or test}/<class>/*, torchvision's download. A dataset may also be a path.
    config["train_images"] keeps a fixed random subset of the training images. Raises UserError.
    """
    name = config["dataset"]
    known = DATASETS.get(name)
    size = config.get("image_size") or (known.image_size if known else 224)
    places = [Path(data_dir) / name, HERE / "data" / name] if known else [Path(name)]
    place = next((p for p in places if (p / "train.npz").exists() or (p / "train").is_dir()), None)
    if place:
        arrays = read_dataset(place, size, IMAGENET10 if name == "imagenet10" else None)
    elif known:
        arrays = download(name, Path(data_dir))
    else:
        raise UserError(f"unknown dataset {name!r}: not one of {', '.join(DATASETS)}, and no folder holding "
                        "{train,test}.npz or {train,val}/<class>/ images; --dataset digits needs no download")
    images, labels = map(torch.from_numpy, arrays[0])
    found = images.shape[1], images.shape[2], int(max(y.max() for _, y in arrays)) + 1
    if known and found != (known.channels, size, known.num_classes):
        raise UserError(f"{place}: images of {found[0]} x {found[1]} x {found[1]} in {found[2]} classes, but {name} "
                        f"has {known.channels} x {size} x {size} in {known.num_classes}")
    if not known:  # statistics of the training images themselves
        pixels = images[:10_000].double() / 255
        std = pixels.std((0, 2, 3)).clamp(min=1e-3)
        known = Dataset(*found, tuple(pixels.mean((0, 2, 3)).tolist()), tuple(std.tolist()))
    config.update(channels=found[0], image_size=found[1], num_classes=found[2], flip=known.flip)
    train, test = (Split(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), known.mean, known.std)
                   for x, y in arrays)
    return fixed_subset(train, config.get("train_images"), "subset"), test


def fixed_subset(split, count, purpose):
    """`count` random images of `split` (None: all), the same for every seed and script."""
    if (count or len(split)) >= len(split):
        return split
    return split.subset(torch.randperm(len(split), generator=random_stream(0, purpose))[:count].sort()[0])


def read_dataset(place, size, wanted=None):
    """[(images uint8 [N, C, H, W], labels [N])] of the training and the test set in the folder `place`."""
    if (place / "train.npz").exists():
        return [read_npz(place / f"{part}.npz") for part in ("train", "test")]
    held_out = place / ("val" if (place / "val").is_dir() else "test")
    parts = [read_class_folders(folder, size, wanted) for folder in (place / "train", held_out)]
    if parts[0][2] != parts[1][2]:
        raise UserError(f"{place / 'train'} and {held_out} hold different classes")
    return [(images, labels) for images, labels, _ in parts]


def read_npz(path):
    arrays = load(path)
    images, labels = arrays.get("images"), arrays.get("labels")
    if not (images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] == images.shape[2]
            and images.size and labels is not None and labels.dtype.kind in "iu" and labels.shape == images.shape[:1]):
        raise UserError(f"{path}: needs `images` (uint8, N x H x H x C) and `labels` (N integers), has "
                        f"{sorted(arrays)}")
    if labels.min() < 0 or labels.max() >= len(labels):
        raise UserError(f"{path}: labels from {labels.min()} to {labels.max()} for {len(labels)} images; classes count "
                        "from 0")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64)


def read_class_folders(folder, size, wanted=None):
    """Images uint8 [N, C, size, size], labels [N] and class names of <folder>/<class>/*.png|jpg, in natural order.

    The shorter side is resized to `size` and the centre cut out; when all files are grey there is one channel.
    """
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    classes = sorted(names, key=lambda c: (0, int(c), c) if c.isdigit() else (1, 0, c))
    classes = [c for c in wanted if c in names] if wanted else classes
    files = [(file, label) for label, c in enumerate(classes) for file in sorted((folder / c).iterdir())
             if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError(f"{folder}: no PNG or JPEG images in class folders")
    pictures = []
    for file, _ in tqdm(files, desc=f"decoding {folder.name}", disable=None, delay=1, leave=False):
        try:
            with Image.open(file) as picture:
                grey = picture.mode in ("1", "L", "I;16")
                pictures.append(np.asarray(fit(picture.convert("L" if grey else "RGB"), size)))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{file}: not a readable image ({error})") from error
    if len({p.ndim for p in pictures}) > 1:  # grey files among coloured ones
        pictures = [p if p.ndim == 3 else np.stack([p] * 3, -1) for p in pictures]
    images = np.stack(pictures).reshape(len(files), size, size, -1).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.array([label for _, label in files]), classes


def fit(picture, size):
    if picture.size == (size, size):
        return picture
    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.BILINEAR)
    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def download(name, data_dir):
    """[(images, labels), (images, labels)] of the training and the test set, through torchvision."""
    from torchvision import datasets

    makers = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST,
              "fashion": datasets.FashionMNIST, "svhn": datasets.SVHN}
    hint = f"{name} not found in {data_dir / name}; put {{train,test}}.npz or {{train,val}}/<class>/ images there, " \
           "or use --dataset digits, which is embedded"
    if name not in makers:
        raise UserError(hint)
    arrays = []
    if together.get().rank:
        wait()  # for the first rank, which downloads
    for part, train in (("train", True), ("test", False)):
        which = {"split": part} if name == "svhn" else {"train": train}
        try:
            data = makers[name](str(data_dir / name), **which, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{hint} (download: {str(error)[:80]})") from error
        images = np.asarray(data.data)
        if name != "svhn":  # the only one that is N x C x H x W already
            images = images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
        labels = data.labels if name == "svhn" else data.targets
        arrays.append((np.ascontiguousarray(images), np.asarray(labels).astype(np.int64)))
    if together.get().rank == 0:
        wait()
    return arrays


#############################################
#              Distilled data               #
#############################################


def load_distilled(path, dataset, ipc, factor=None, device="cpu"):
    """The distilled split of `ipc` stored images a class, decoded to ipc * factor**2, normalised for `dataset`.

    Formats, told apart by structure: EDC/IDC `[images, labels]` in [0, 1]; DSA/DC/DM `{"data": [..., [images,
    labels]]}`, KIP `[images NHWC, ...]` and MTT images_best.pt + labels_best.pt, all three already normalised;
    class folders of PNG; one PNG contact sheet (a row a class). Without `path`, the embedded set. Without
    `factor`, that of the config.json beside the file, else 1. `dataset` is a Dataset. Raises UserError.
    """
    images, labels, raw = read_distilled(Path(path), dataset, ipc)
    beside = Path(path).with_suffix(".json"), Path(path).parent / "config.json"
    settings = next((file for file in beside if file.exists()), None)
    factor = factor or (load(settings).get("factor", 1) if settings and not Path(path).is_dir() else 1)
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    if images.shape[1:] != shape or not len(images):
        held, needed = (" x ".join(map(str, sides)) for sides in (images.shape[1:], shape))
        raise UserError(f"{path}: {len(images)} images are {held}, the dataset's {needed}")
    # The number first: a small file may claim any.
    if len(images) != ipc * dataset.num_classes or any((labels == c).sum() != ipc for c in range(dataset.num_classes)):
        raise UserError(f"{path}: holds {len(images)} images, expected {dataset.num_classes} classes of --ipc {ipc}")
    images, labels = images.float(), labels.long()
    if not images.isfinite().all():
        raise UserError(f"{path}: holds values that are not finite")
    if raw:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
        images = (images - mean) / std
    elif .4 < images.std() < .75:
        print(f"warning: {path}: standard deviation {images.std():.2f} looks ZCA-whitened; such a set trains badly "
              "unless real data is whitened too", file=sys.stderr)
    order = labels.argsort(stable=True)
    blank = ((.5 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)).view(-1, 1, 1)
    images, labels = decode_tiles(images[order], labels[order], factor, blank)
    return Split(images.to(device), labels.to(device))


def read_distilled(path, dataset, ipc):
    """(images [N, C, H, W], labels [N], whether values are raw, in [0, 1]) of any known format."""
    if path.is_dir() and not (path / "images_best.pt").exists():
        images, labels, classes = read_class_folders(path, dataset.image_size)
        return torch.from_numpy(images).float() / 255, torch.from_numpy(labels), True
    if path.suffix == ".png":
        return *read_contact_sheet(path, dataset, ipc), True
    if path.is_dir() or path.name == "images_best.pt":
        folder = path if path.is_dir() else path.parent
        data, raw = [load(folder / "images_best.pt"), load(folder / "labels_best.pt")], False
    else:
        data, raw = load(path), True
    if isinstance(data, dict) and isinstance(data.get("data"), list) and data["data"]:
        data, raw = data["data"][-1], False
    images, labels = (*data, None, None)[:2] if isinstance(data, (list, tuple)) else (None, None)
    if torch.is_tensor(images) and images.layout == torch.strided and images.ndim == 4 and not images.is_complex():
        if images.shape[1] != dataset.channels and images.shape[3] == dataset.channels:  # KIP's labels are no indices
            labels = torch.arange(dataset.num_classes).repeat_interleave(len(images) // dataset.num_classes)
            return images.permute(0, 3, 1, 2), labels, False
        if torch.is_tensor(labels) and labels.shape == images.shape[:1] and not labels.is_floating_point():
            return images, labels, raw
    raise UserError(f"{path}: not a distilled set of a known format (EDC, DSA/DC/DM, KIP, MTT, PNG class folders or "
                    "contact sheet)")


def read_contact_sheet(path, dataset, ipc):
    """Images [classes * ipc, C, H, W] in [0, 1] and labels of a PNG with a row a class and a column an image."""
    size, rows = dataset.image_size, dataset.num_classes
    try:
        sheet = np.asarray(Image.open(path).convert("L" if dataset.channels == 1 else "RGB"))
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error})") from error
    if sheet.shape[:2] != (rows * size, ipc * size):
        raise UserError(f"{path}: {sheet.shape[1]} x {sheet.shape[0]} pixels, expected {rows} rows of --ipc {ipc} "
                        f"images of {size} pixels")
    tiles = torch.from_numpy(sheet.copy()).reshape(rows, size, ipc, size, -1).permute(0, 2, 4, 1, 3)
    return tiles.reshape(rows * ipc, -1, size, size).float() / 255, torch.arange(rows).repeat_interleave(ipc)


def embedded_distilled(name, ipc):
    """Path of the distilled set that comes with the project. Raises UserError when there is none."""
    path = HERE / "data" / "distilled" / f"{name}_ipc{ipc}.png"
    if not path.exists():
        embedded = ", ".join(sorted(p.stem for p in path.parent.glob("*.png"))) or "none"
        raise UserError(f"no distilled set of {name} with ipc {ipc} is embedded (there are: {embedded}); "
                        f"make one: python distill.py --dataset {name} --ipc {ipc}; or give --distilled PATH")
    return path


def decode_tiles(images, labels, factor, blank=0.5):
    """IDC's multi-formation: each image holds factor x factor tiles, cut row by row, resized bilinearly to full size.

    images [N, C, H, W] sorted by class -> [N * factor**2, C, H, W], sorted by class; differentiable. Sizes that
    factor does not divide are padded at the bottom and right with `blank` (0.5 grey in raw values).
    """
    if factor == 1:
        return images, labels
    n, channels, size, _ = images.shape
    tile = math.ceil(size / factor)
    canvas = (torch.zeros(n, channels, tile * factor, tile * factor) + blank).to(images)
    canvas[:, :, :size, :size] = images
    tiles = canvas.reshape(n, channels, factor, tile, factor, tile).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
    tiles = F.interpolate(tiles, size=(size, size), mode="bilinear", align_corners=False)
    labels = labels.repeat(factor * factor)
    order = labels.argsort(stable=True)
    return tiles[order], labels[order]
