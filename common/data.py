"""Real data as splits in memory: known datasets, .npz files, class folders, torchvision's downloads."""
import functools
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import ranks
from .arrays import (IMAGENET10, IMAGES, LABELS, as_bytes, channels_first, class_numbers, described, find_member,
                     headers, read_member, sides)
from .errors import UserError, first_line, listed, note
from .pictures import inside, read_folders, visible
from .streams import random_stream

EMBEDDED = Path(__file__).resolve().parent / "embedded"
LARGEST = 1024  # side in pixels that pictures are read in

#############################################
#                  Splits                   #
#############################################


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] (uint8, or float that is already normalised) and labels [N] on one device.

    Labels of some distilled sets are soft: float [N, classes]. `fingerprint` is that of all data the split is from.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mean: tuple = ()
    std: tuple = ()
    fingerprint: str = ""

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Normalised float32 images and labels of `index` (a tensor or a slice)."""
        index = index.to(self.labels.device) if torch.is_tensor(index) else index
        images, labels = self.images[index], self.labels[index]
        if images.dtype != torch.uint8:
            return images, labels
        mean, std = self.scale
        return images.float().sub_(mean).div_(std), labels

    @functools.cached_property
    def scale(self):
        """Mean and standard deviation of the pixels as bytes, [C, 1, 1] each.

        Made on the CPU: the streams of a GPU that share a split do not wait for each other's kernels.
        """
        return [(255 * torch.tensor(v).view(-1, 1, 1)).to(self.labels.device) for v in (self.mean, self.std)]

    @functools.cached_property
    def black(self):
        """What a pixel of value 0 is when it is normalised, [C, 1, 1]."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return -(mean / std).view(-1, 1, 1).to(self.labels.device)

    def subset(self, index):
        return replace(self, images=self.images[index], labels=self.labels[index])

    def hard(self):
        """The same images with the likeliest class of every label."""
        return replace(self, labels=hardened(self.labels))


def hardened(labels):
    """The classes [N] of labels: of soft ones [N, classes], the likeliest."""
    return labels if labels.ndim == 1 else labels.argmax(1)


def fixed_subset(split, count, purpose):
    """`count` random images of `split` (None: all), the same for every seed and script."""
    if (count or len(split)) >= len(split):
        return split
    return split.subset(torch.randperm(len(split), generator=random_stream(0, purpose))[:count].sort()[0])


def set_aside(real, count):
    """(the rest, `count` random images) of the training images: what is tuned is not scored on the test set."""
    if count >= len(real):
        raise UserError(f"--hold-out {count}: there are {len(real)} training images")
    order = torch.randperm(len(real), generator=random_stream(0, "hold out"))
    return real.subset(order[count:].sort()[0]), real.subset(order[:count])


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

def load_real(config, data_dir, device="cpu"):
    """(train, test) splits of config["dataset"]: a name, or the path of a folder or an .npz file.

    A name is looked for in data_dir, then among the embedded datasets, then downloaded. Fills in the config's dataset
    (now its name), channels, image_size, num_classes, flip and data_fingerprint. A config that has a fingerprint
    already, as that of a ticket, gets the data it is of or none. config["train_images"] keeps a fixed random subset of
    the training images. Prints what there is. Raises UserError.
    """
    name = dataset_name(config["dataset"])
    known = DATASETS.get(name)
    size = config.get("image_size") or (known.image_size if known else None)
    if size and not 1 <= size <= LARGEST:
        raise UserError(f"--image-size {size}: not a number of pixels from 1 to {LARGEST}")
    place, parts, notes, sha = find_data(config, Path(data_dir), size)
    classes = check_parts(place, parts, size)
    images = parts[0][0]
    found = images.shape[1], images.shape[2], classes
    if known and found != (known.channels, size, known.num_classes):
        raise UserError(f"{place}: images of {sides(images.shape[1:])} in {classes} classes, but {name} has "
                        f"{known.channels} x {size} x {size} in {known.num_classes}; other data needs another name")
    known = known or Dataset(*found, *mean_and_deviation(images[:10_000]))
    config.update(dataset=name, channels=found[0], image_size=found[1], num_classes=classes, flip=known.flip,
                  data_fingerprint=sha)
    note(*notes, *absent(place, parts[1][1], classes))
    for part, (x, y) in zip(("train", "test"), parts):
        print(f"{part}: {counted(x.shape, y, classes)}")
    train, test = (Split(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), known.mean, known.std, sha)
                   for x, y in parts)
    return fixed_subset(train, config.get("train_images"), "subset"), test


def dataset_name(text):
    """The name of a dataset that is given by name or path: where it lies is no part of what it is."""
    return text if text in DATASETS else Path(os.path.abspath(text)).name


def data_fingerprint(*arrays):
    """16 hexadecimal digits of the SHA-256 over arrays of images and labels: types, shapes and all values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def mean_and_deviation(images):
    """(mean, deviation) of every channel of uint8 images [N, C, H, W], in [0, 1]; exact sums, whatever the threads."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].reshape(-1), minlength=256)
        mean = counts @ values / counts.sum()
        means.append(float(mean))
        deviations.append(max(1e-3, float(np.sqrt(counts @ (values - mean) ** 2 / (counts.sum() - 1)))))
    return tuple(means), tuple(deviations)


def check_parts(place, parts, size=None):
    """The number of classes of [(images, labels)] of training and test set. Raises UserError for what does not fit."""
    (images, labels), (test_images, test_labels) = parts
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{place}: training images are {sides(images.shape[1:])}, test images "
                        f"{sides(test_images.shape[1:])}")
    if size and images.shape[2] != size:
        raise UserError(f"{place}: images are {sides(images.shape[1:])}, wanted {size} x {size} pixels; only pictures "
                        "in class folders are resized")
    classes = int(labels.max()) + 1
    lowest = min(labels.min(), test_labels.min())
    if lowest < 0 or classes > len(labels):
        raise UserError(f"{place}: labels from {lowest} to {classes - 1} for {len(labels)} images; classes count from "
                        "0")
    empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(empty):
        raise UserError(f"{place}: no training image of class {listed(empty)}, but of {classes - 1}; classes count "
                        "from 0")
    if test_labels.max() >= classes:
        raise UserError(f"{place}: test labels reach {test_labels.max()}, training labels only {classes - 1}")
    return classes


def absent(place, labels, classes):
    """A note about the classes without a test image, if there are some."""
    missing_ones = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    return [f"{place}: no test image of class {listed(missing_ones)}"] if len(missing_ones) else []


def counted(shape, labels, classes):
    """Images [N, C, H, W] and how many there are of every class, in words."""
    counts = np.bincount(labels, minlength=classes)
    each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    return f"{len(labels):,} images of {sides(shape[1:])} in {classes} classes, {each} each"


#############################################
#              Where data lies              #
#############################################

WANTED = "train.npz and test.npz, or train/<class>/ and val/<class>/ with pictures"


def find_data(config, data_dir, size):
    """(place, parts, notes, fingerprint) of the dataset that a config names, and whose fingerprint it may hold."""
    text, wanted = config["dataset"], config.get("data_fingerprint")
    place = find_place(text, data_dir)
    if not place and text not in DATASETS and wanted:
        return find_renamed(text, data_dir, size, wanted)
    if not place and text not in DATASETS:
        raise UserError(missing(text, data_dir))
    if place:
        parts, notes = read_dataset(place, size, dataset_name(text))
    else:
        place, parts, notes = data_dir / text, download(text, data_dir), []
    sha = data_fingerprint(*parts[0], *parts[1])
    if wanted and sha != wanted:
        raise UserError(f"{place} holds other data (fingerprint {sha}) than was used before ({wanted}); --dataset or "
                        "--data-dir says where that is")
    return place, parts, notes, sha


def find_place(text, data_dir):
    """Where the data lies that a name or path means; None when it is nowhere."""
    name = dataset_name(text)
    places = [Path(text)]
    if text in DATASETS:
        places = [data_dir / name, data_dir / f"{name}.npz", EMBEDDED / name]
    elif text == name:
        places.append(data_dir / name)
    for place in places:
        if is_dataset(place):
            return place
    return None


def is_dataset(place):
    """Whether a path is an .npz file, or a folder that holds a training set; os.path finds no fault with any path."""
    single = place.suffix.lower() == ".npz" and os.path.isfile(place)
    return single or os.path.isfile(place / "train.npz") or os.path.isdir(place / "train")


def find_renamed(text, data_dir, size, wanted):
    """find_data for a dataset that has another name now: what in data_dir has its fingerprint. Raises UserError."""
    places = visible(data_dir) if os.path.isdir(data_dir) else []
    for place in filter(is_dataset, places):
        try:
            parts, notes = read_dataset(place, size)
        except UserError:  # whatever else lies there
            continue
        if data_fingerprint(*parts[0], *parts[1]) == wanted:
            return place, parts, notes, wanted
    raise UserError(missing(text, data_dir))


def missing(text, data_dir):
    """Why there is no dataset where a name or path points to."""
    if os.path.isdir(text):
        return f"{text}: no dataset (it holds {inside(Path(text))}); wanted {WANTED}"
    if os.path.exists(text):
        return f"{text}: no dataset; wanted an .npz file, or a folder with {WANTED}"
    return (f"unknown dataset {text[:200]!r}: not one of {', '.join(DATASETS)}, and no folder of that name here or in "
            f"{data_dir} holds {WANTED}; --dataset says where it is, digits needs no download")


#############################################
#                 Readers                   #
#############################################


def read_dataset(place, size=None, name=None):
    """([(images uint8 [N, C, H, H], labels [N])] of training and test set, notes) of a folder or .npz file.

    Without `size`, that of the pictures. `name`: of a known dataset, whose channels and classes are wanted.
    """
    if os.path.isfile(place):
        return read_arrays([(place, "train"), (place, "test")])
    if os.path.isfile(place / "train.npz"):
        tested, notes = held_out(place, ("test", "val", "valid"), ".npz")
        parts, more = read_arrays([(place / "train.npz", None), (tested, None)])
        return parts, notes + more
    tested, notes = held_out(place, ("val", "valid", "validation", "test"))
    channels = DATASETS[name].channels if name in DATASETS else None
    wanted = IMAGENET10 if name == "imagenet10" else None
    parts, _, more = read_folders([place / "train", tested], size, channels, wanted)
    return parts, notes + more


def held_out(place, names, suffix=""):
    """(the folder or file in `place` that is tested on, notes on others). Raises UserError when there is none."""
    found = [place / f"{name}{suffix}" for name in names if os.path.exists(place / f"{name}{suffix}")]
    if not found:
        wanted = " or ".join(f"{name}{suffix}" for name in names)
        raise UserError(f"{place}: holds {inside(place)}; wanted {wanted} beside train{suffix}")
    others = listed(other.name for other in found[1:])
    return found[0], [f"{place}: tested on {found[0].name}; left out: {others}"] if others else []


def read_arrays(sources):
    """([(images uint8 [N, C, H, H], labels [N])], notes) of (.npz file, part in its members' names or None) each."""
    what = sources[0][0]
    members = [find_members(path, part) for path, part in sources]
    images = [channels_first(images, what) for images, _ in members]
    images, notes = as_bytes(images, what)
    labels, more = class_numbers([labels for _, labels in members], what)
    for x, y in zip(images, labels):
        if len(x) != len(y):
            raise UserError(f"{what}: {len(x)} images, but {len(y)} labels")
    return [(np.ascontiguousarray(x), y) for x, y in zip(images, labels)], notes + more + left_out(what, sources)


def left_out(path, sources):
    """A note about the members of an .npz file of all parts that are of none of them: a validation set, for one."""
    parts = tuple(part for _, part in sources if part)
    names = [name for name in headers(path) if parts and not name.lower().startswith(parts)
             and not name.lower().endswith(parts)]
    return [f"{path}: left out: {listed(names)}"] if names else []


def find_members(path, part=None):
    """(images, labels) of an .npz file, of its members only these. Raises UserError naming those that it has."""
    heads = headers(path)
    names = [find_member(heads, keys, part) for keys in (IMAGES, LABELS)]
    if None in names:
        wanted = f"{part}_images and {part}_labels" if part else "images and labels"
        raise UserError(f"{path}: holds {described(heads)}; wanted {wanted}")
    return [read_member(path, name, heads[name]) for name in names]


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
            raise UserError(f"{hint} (download: {first_line(error)})") from error
        images = np.asarray(data.data)
        if name != "svhn":  # the only one that is N x C x H x W already
            images = images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
        labels = data.labels if name == "svhn" else data.targets
        arrays.append((np.ascontiguousarray(images), np.asarray(labels).astype(np.int64)))
    if ranks.is_first():
        ranks.wait()
    return arrays
