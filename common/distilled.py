"""Distilled sets as splits: every published format, told apart by content, and multi-formation's tiles."""
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .arrays import (IMAGES, LABELS, Header, class_numbers, described, find_member, headers, is_npz, numbered,
                     read_member, sides, span)
from .data import EMBEDDED, Dataset, Split, counted, data_fingerprint, hardened
from .errors import UserError, listed, note
from .files import check_memory, check_regular, load_tensors, read_settings, reason
from .pictures import Surprises, decode, in_channels, is_picture, opens_as_picture, read_folders, visible

WANTED = "[images, labels], DC, DSA, DM, KIP, MTT, DATM, .npz or .npy arrays, class folders or a contact sheet"
ARRAYS = (".pt", ".pth", ".npy", ".npz")  # suffixes looked for in a folder


def load_distilled(path, dataset, ipc, factor=None, device="cpu"):
    """The distilled split of `ipc` stored images a class, decoded to ipc * factor**2, normalised for `dataset`.

    Formats and values are told by what is in the file; docs/formats.md lists them. Without `factor`, that of the .json
    file beside it, else 1. `dataset` is a Dataset. Labels are numbers [N], or soft [N, classes] where the file's are.
    Prints what there is. Raises UserError.
    """
    path = Path(path)
    factor = tiles_along_a_side(path, factor, dataset.image_size)
    images, labels = read_distilled(path, dataset)
    images = arranged(images, dataset, path)
    labels = labels_of(labels, len(images), dataset.num_classes, path)
    check_counts(labels, dataset.num_classes, ipc, path)
    check_memory(path, 4 * images.size * factor ** 2)
    images, values = scaled(images, path)
    sha = data_fingerprint(images, labels, np.int64(factor))
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    tiles = f"; {factor} x {factor} tiles in each" if factor > 1 else ""
    numbers = hardened(labels)
    print(f"distilled: {counted(images.shape, numbers.numpy(), dataset.num_classes)}, values {values}{tiles}")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    if values == "normalised":
        warn_of_whitening(images, path)
    else:
        images = (images - mean) / std
    order = numbers.argsort(stable=True)
    images, labels = decode_tiles(images[order], labels[order], factor, (.5 - mean) / std)
    return Split(images.to(device), labels.to(device), fingerprint=sha)


def distilled_of(config, mean, std, device="cpu"):
    """load_distilled of the set that a config names, or of the embedded one, normalised by `mean` and `std`."""
    dataset = Dataset(config["channels"], config["image_size"], config["num_classes"], mean, std)
    ipc = config.get("ipc", 10)
    path = config.get("distilled") or embedded_distilled(config["dataset"], ipc)
    split = load_distilled(path, dataset, ipc, config.get("factor"), device)
    known = config.get("distilled_fingerprint", split.fingerprint)
    if known != split.fingerprint:
        raise UserError(f"{path} holds another set (fingerprint {split.fingerprint}) than the masks were found on "
                        f"({known})")
    return split


def embedded_distilled(name, ipc):
    """Path of the distilled set that comes with the project. Raises UserError when there is none."""
    path = EMBEDDED / "distilled" / f"{name}_ipc{ipc}.png"
    if not os.path.exists(path):
        embedded = ", ".join(sorted(p.stem for p in path.parent.glob("*.png"))) or "none"
        raise UserError(f"no distilled set of {name} with ipc {ipc} is embedded (there are: {embedded}); "
                        f"make one: python distill.py --dataset {name} --ipc {ipc}; or give --distilled PATH")
    return path


#############################################
#            What a file holds              #
#############################################


def read_distilled(path, dataset):
    """(images, labels or None): the arrays of a set of any format as they are kept, pictures as [N, C, H, W]."""
    if os.path.isdir(path):
        return read_folder(path, dataset)
    check_regular(path)
    if is_npz(path):
        return read_npz(path)
    with open(path, "rb") as file:
        head = file.read(2)
    if head not in (b"PK", b"\x80\x02") and (is_picture(path) or opens_as_picture(path)):  # those of torch.save
        return read_contact_sheet(path, dataset)
    value = read_value(path)
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return read_halves(path, value)
    images, labels = images_and_labels(value, path)
    if images is None:
        raise UserError(f"{path}: not a distilled set of a known format (holds {contents(value)}; wanted {WANTED})")
    return as_array(images, path), None if labels is None else as_array(labels, path)


def images_and_labels(value, path):
    """The two in what torch.save wrote: a list, a dict, or DC's, DSA's and DM's {"data": [..., [images, labels]]}."""
    if isinstance(value, dict) and isinstance(value.get("data"), (list, tuple)) and value["data"]:
        value = value["data"][-1]  # one a repetition
    names = 0, 1
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    elif isinstance(value, dict):
        names = find_member(value, IMAGES), find_member(value, LABELS)
    else:
        return None, None
    name_left_out(path, {name: part.shape for name, part in value.items() if hasattr(part, "shape")}, *names)
    return value.get(names[0]), value.get(names[1])


def name_left_out(path, shapes, images, labels):
    """A note about arrays {name: shape} with a row an image beside the two that are read: other labels, an average."""
    rows = shapes.get(images, ())[:1]
    others = [name for name, shape in shapes.items() if rows and shape[:1] == rows and name not in (images, labels)]
    if others:
        note(f"{path}: left out: {listed(others)}")


def read_value(path):
    """What torch.save or np.save wrote. Raises UserError."""
    try:
        with open(path, "rb") as file:
            numpy = file.read(6) == b"\x93NUMPY"
        return np.load(path, mmap_mode="r") if numpy else load_tensors(path)
    except UserError:
        raise
    except Exception as error:  # almost any type on a damaged file
        raise UserError(f"{path}: not a distilled set of a known format ({reason(error)}); wanted {WANTED}") from None


def as_array(value, path):
    """A tensor, an array or a list of either or of numbers as an array. Raises UserError for what is none."""
    try:
        if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple, dict)):
            value = np.stack([np.asarray(item) for item in value])
        if torch.is_tensor(value):
            value = value.detach().cpu()
            value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        if isinstance(value, np.ndarray):
            return value
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # sparse, quantised, without contents
        pass
    raise UserError(f"{path}: not a distilled set of a known format (holds {contents(value)}; wanted {WANTED})")


def contents(value, depth=2):
    """What a file holds, in words; a list may hold itself."""
    if isinstance(value, dict) and depth:
        return described({key: contents(item, depth - 1) for key, item in value.items()})
    if isinstance(value, (list, tuple)) and depth:
        return f"[{listed(contents(item, depth - 1) for item in value)}]"
    if torch.is_tensor(value):
        layout = "" if value.layout == torch.strided else f"{value.layout} ".removeprefix("torch.")
        return layout + str(Header(tuple(value.shape), str(value.dtype).removeprefix("torch.")))
    return str(Header(value.shape, value.dtype)) if isinstance(value, np.ndarray) else type(value).__name__


def read_npz(path):
    heads = headers(path)
    images, labels = find_member(heads, IMAGES), find_member(heads, LABELS)
    if images is None:
        raise UserError(f"{path}: holds {described(heads)}; wanted images and labels")
    name_left_out(path, {name: head.shape for name, head in heads.items() if head}, images, labels)
    return read_member(path, images, heads[images]), labels and read_member(path, labels, heads[labels])


def pair_of_halves(path):
    """(file of images, file of labels), of which `path` is one; None when the other is not there."""
    name, suffix = path.name, path.suffix
    pairs = [(name.replace("label", "image"), name)]
    if "label" not in name:
        others = name.replace("image", "label"), f"labels{suffix}", f"{path.stem}_labels{suffix}"
        pairs = [(name, other) for other in others]
    for images, labels in pairs:
        if images != labels and all(os.path.isfile(path.with_name(half)) for half in (images, labels)):
            return path.with_name(images), path.with_name(labels)
    return None


def read_halves(path, value):
    """(images, labels) where they are kept apart: MTT's images_best.pt and labels_best.pt, .npy."""
    files = pair_of_halves(path)
    if files is None:
        raise UserError(f"{path}: holds {contents(value)} alone; wanted images and labels, as images_best.pt and "
                        "labels_best.pt beside each other, or in one file")
    return [as_array(read_value(file), file) for file in files]


def read_folder(folder, dataset):
    """(images, labels) of a folder that holds files of images and labels, class folders, or one file of both."""
    files = [file for file in visible(folder) if file.suffix in ARRAYS and os.path.isfile(file)]
    pairs = sorted({pair_of_halves(file) for file in files} - {None})
    if not pairs and any(os.path.isdir(place) for place in visible(folder)):
        parts, classes, notes = read_folders([folder], dataset.image_size, dataset.channels)
        note(*notes)
        if not all(name.isdecimal() for name in classes):
            note(f"{folder}: classes are {numbered(classes)}")
        return parts[0]
    sets = [images for images, _ in pairs] or files
    sets = [file for file in sets if file.stem.endswith("best") or file.name == "data.pt"] or sets
    if len(sets) != 1:
        found = listed(file.name for file in sets) or "neither class folders nor a file of arrays"
        raise UserError(f"{folder}: holds {found}; give the path of one set")
    return read_distilled(sets[0], dataset)


def read_contact_sheet(path, dataset):
    """Images uint8 [N, C, H, W] and labels of a picture with a row a class and a column an image."""
    size, rows = dataset.image_size, dataset.num_classes
    surprises = Surprises()
    sheet = in_channels(decode(path, surprises), dataset.channels, path)
    note(*surprises.lines())
    height, width = sheet.shape[1:]
    if height != rows * size or width % size:
        raise UserError(f"{path}: {width} x {height} pixels, expected a contact sheet of {rows} rows of images of "
                        f"{size} pixels, {rows * size} high")
    columns = width // size
    tiles = sheet.reshape(-1, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
    return tiles.reshape(rows * columns, -1, size, size), np.arange(rows).repeat(columns)


def contact_sheet(images):
    """PNG bytes of images [classes, ipc, C, H, W] in [0, 1]: a row a class, a column an image, undecoded."""
    classes, ipc, channels, size, _ = images.shape
    pixels = (images * 255).round().byte().permute(0, 3, 1, 4, 2).reshape(classes * size, ipc * size, channels)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2).cpu().numpy()).save(buffer, "png", optimize=True)
    return buffer.getvalue()


#############################################
#             What arrays mean              #
#############################################


def arranged(images, dataset, path):
    """Images [N, C, H, W] of the dataset's shape, of channels first or last. Raises UserError."""
    channels, size = dataset.channels, dataset.image_size
    if images.shape[1:] == (channels, size, size) and len(images):
        return images
    if images.shape[1:] == (size, size, channels) and len(images):
        return images.transpose(0, 3, 1, 2)
    if images.shape[1:] == (size, size) and channels == 1 and len(images):
        return images[:, None]
    raise UserError(f"{path}: {len(images) if images.ndim else 1} images are {sides(images.shape[1:])}, the dataset's "
                    f"{channels} x {size} x {size}")


def labels_of(labels, count, classes, path):
    """Labels int64 [N], or float32 [N, classes] if they are soft, of numbers, one-hot rows, shares or KIP's targets."""
    if labels is None:
        note(f"{path}: no labels in the file, taken as {classes} classes one after the other")
        return np.arange(classes).repeat(math.ceil(count / classes))[:count]
    if labels.shape[:1] != (count,):
        raise UserError(f"{path}: {count} images, but labels are {sides(labels.shape)}")
    if labels.ndim != 2 or labels.shape[1] == 1:
        numbers, notes = class_numbers([labels], path)
        note(*notes)
        return numbers[0]
    if labels.shape[1] != classes:
        raise UserError(f"{path}: labels are {sides(labels.shape)}, the dataset has {classes} classes")
    span(labels, path)
    shares = (labels >= 0).all() and np.allclose(labels.sum(1, dtype=np.float64), 1, atol=.01)
    if shares and ((labels > 0).sum(1) > 1).any():
        return labels.astype(np.float32)
    if not shares:
        note(f"{path}: labels are rows of numbers that are no shares of 1; the largest of each counts")
    return labels.argmax(1)


def check_counts(labels, classes, ipc, path):
    """Raises UserError unless every class has `ipc` images. Soft labels are those of no class alone."""
    if labels.ndim == 2:
        if len(labels) != ipc * classes:
            raise UserError(f"{path}: holds {len(labels)} images, not --ipc {ipc} of {classes} classes")
        return
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path}: labels go from {labels.min()} to {labels.max()}, the dataset has classes 0 to "
                        f"{classes - 1}")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() == 0:
        raise UserError(f"{path}: no image of class {listed(np.flatnonzero(counts == 0))} in {len(labels)}, expected "
                        f"--ipc {ipc} of each")
    if counts.min() != ipc or counts.max() != ipc:
        held = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        raise UserError(f"{path}: holds {held} images a class, expected --ipc {ipc}")


def scaled(images, path):
    """(float32 images, "in [0, 1]" or "normalised") of images of any numbers, by what the values are.

    Raises UserError for values that are neither in [0, 1], slightly beyond, nor 0 to 255, nor about 0.
    """
    low, high, _ = span(images, path)
    mean, integers = images.mean(dtype=np.float64), images.dtype.kind != "f"
    if low == high:
        raise UserError(f"{path}: all values of the images are {low:g}")
    if -.25 <= low and high <= 1.25:
        return np.array(images, np.float32, order="C"), "in [0, 1]"
    if -13 <= low and high <= 268 and (integers or high > 128):
        return np.array(images, np.float32, order="C") / np.float32(255), "in [0, 1]"
    if -20 <= low < -.25 and 1.25 < high <= 20 and abs(mean) <= 1 and not integers:
        return np.array(images, np.float32, order="C"), "normalised"
    raise UserError(f"{path}: values ({images.dtype}) go from {low:g} to {high:g}, their mean is {mean:.3g}; wanted "
                    "[0, 1], 0 to 255, or normalised to mean 0 and deviation 1")


def neighbour_correlation(images):
    """Correlation of pixels beside and below each other in images [N, C, H, W]: 0.75 and more, unless whitened."""
    x = images.double() - images.double().mean((0, 2, 3), keepdim=True)
    beside, below = (x[..., 1:] * x[..., :-1]).mean(), (x[..., 1:, :] * x[..., :-1, :]).mean()
    return float((beside + below) / 2 / x.square().mean())


def warn_of_whitening(images, path):
    """ZCA leaves .30 to .56; noise that MTT starts from .23; in images below 28 pixels neighbours differ anyway."""
    correlation = neighbour_correlation(images)
    if images.shape[-1] >= 28 and .25 < correlation < .65:
        note(f"{path}: neighbouring pixels correlate by {correlation:.2f}, which looks ZCA-whitened; such a set trains "
             "badly unless real data is whitened too")


def tiles_along_a_side(path, factor, size):
    """The factor of --factor, or of the .json file beside a set, else 1. Raises UserError for what is none."""
    source = "--factor"
    if factor is None:
        source, factor = stored_factor(path)
    most = max(1, size // 2)
    if type(factor) is not int or not 1 <= factor <= most:
        raise UserError(f"{source} {json.dumps(factor):.40}: wanted the number of tiles along a side of {size} pixels, "
                        f"1 to {most}; --factor says it")
    return factor


def stored_factor(path):
    """(where it is said, the factor) of <name>.json beside a set, or config.json beside or in it; 1 without one."""
    places = [path / "config.json"]
    if not os.path.isdir(path):
        places = [path.parent / f"{path.stem}.json", path.parent / "config.json"]
    for file in places:
        if not os.path.exists(file):
            continue
        try:
            return f"{file}: factor", read_settings(file).get("factor", 1)
        except UserError as error:
            raise UserError(f"{error}; with --factor it is not read") from None
    return "", 1


def encode_tiles(images, factor):
    """images [ipc * factor**2, C, H, W] of one class, made small, as the tiles of [ipc, C, H, W].

    The inverse of decode_tiles up to the loss of resolution.
    """
    size = images.shape[-1]
    side = math.ceil(size / factor)
    tiles = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    tiles = tiles.unflatten(0, (factor, factor, -1))  # [row, column, ipc, C, side, side]
    canvas = tiles.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
    return canvas[:, :, :size, :size].clamp(0, 1)


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
    labels = labels.repeat(factor * factor, *[1] * (labels.ndim - 1))
    order = hardened(labels).argsort(stable=True)
    return tiles[order], labels[order]
