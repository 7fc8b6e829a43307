"""Distilled sets as splits: every published format, told apart by structure, and multi-formation's tiles."""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .data import EMBEDDED, Split, read_class_folders
from .errors import UserError
from .files import load


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
    path = EMBEDDED / "distilled" / f"{name}_ipc{ipc}.png"
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
