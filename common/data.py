"""Real data as splits in memory: known datasets, .npz files, class folders, torchvision's downloads."""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import ranks
from .errors import UserError
from .files import load
from .streams import random_stream

EMBEDDED = Path(__file__).resolve().parent / "embedded"

#############################################
#                  Splits                   #
#############################################


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] (uint8, or float that is already normalised) and labels [N] on one device."""

    images: torch.Tensor
    labels: torch.Tensor
    mean: tuple = ()
    std: tuple = ()

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Normalised float32 images and labels of `index` (a tensor or a slice)."""
        index = index.to(self.labels.device) if torch.is_tensor(index) else index
        images, labels = self.images[index], self.labels[index]
        if images.dtype != torch.uint8:
            return images, labels
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return images.float().sub_(mean * 255).div_(std * 255), labels

    def subset(self, index):
        return replace(self, images=self.images[index], labels=self.labels[index])


def fixed_subset(split, count, purpose):
    """`count` random images of `split` (None: all), the same for every seed and script."""
    if (count or len(split)) >= len(split):
        return split
    return split.subset(torch.randperm(len(split), generator=random_stream(0, purpose))[:count].sort()[0])


def random_subset(split, ipc, num_classes, stream):
    """`ipc` random images of each class. Raises UserError when a class has fewer."""
    labels = split.labels.cpu()
    fewest = int(torch.bincount(labels, minlength=num_classes).min())
    if fewest < ipc:
        raise UserError(f"--ipc {ipc}: a class has only {fewest} images")
    order = torch.randperm(len(split), generator=stream)
    chosen = torch.cat([order[labels[order] == c][:ipc] for c in range(num_classes)])
    return split.subset(chosen.to(split.labels.device))


#############################################
#              Known datasets               #
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
    places = [Path(data_dir) / name, EMBEDDED / name] if known else [Path(name)]
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


#############################################
#                 Readers                   #
#############################################


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
    if not ranks.is_first():
        ranks.wait()  # for the first rank, which downloads
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
    if ranks.is_first():
        ranks.wait()
    return arrays
