"""What arrays of images and labels mean: members of .npz files, layouts, values, labels. The unclear is refused."""
import math
import re
import zipfile
from typing import NamedTuple

import numpy as np

from .errors import UserError, listed
from .files import check_memory, check_regular, reason

IMAGES = ("images", "image", "x", "data", "arr_0")  # names of members, in capitals or not; arr_0: without a name
LABELS = ("labels", "label", "y", "targets", "target", "arr_1")

#############################################
#            The order of classes           #
#############################################

IMAGENET10 = ("n02869837 n01749939 n02488291 n02107142 n13037406 "
              "n02091831 n04517823 n04589890 n03062245 n01773797").split()
KNOWN_ORDERS = [  # by number; where it is that of the letters (CIFAR's own names) none is needed
    IMAGENET10,
    "plane car bird cat deer dog frog horse ship truck".split(),
    "t-shirt-top trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split(),
    "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split(),
    "zero one two three four five six seven eight nine".split(),
]


def class_order(names):
    """Class names in the order of their numbers: a known dataset's, else natural (2 before 10).

    The one source of that order, for real and distilled data, folders and text labels.
    """
    plain = {re.sub(r"[ _/]", "-", name.lower()): name for name in names}
    for order in KNOWN_ORDERS:
        if set(plain) == set(order) and len(plain) == len(names):
            return [plain[name] for name in order]
    return sorted(names, key=natural)


def natural(name):
    """Sorting key: digits by their number, the rest by letters."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in parts], name


#############################################
#              Members of .npz              #
#############################################


class Header(NamedTuple):
    shape: tuple
    dtype: np.dtype

    def __str__(self):
        return f"{self.dtype} {sides(self.shape)}"


def sides(shape):
    """A shape in words: 3 x 32 x 32."""
    return " x ".join(map(str, shape)) or "one number"


def is_npz(path):
    """Whether a file is a zip archive of arrays, whatever its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # zipfile raises many types on what is none
        return False


def headers(path):
    """{member: Header} of an .npz file, read without the contents; None of a broken one. Raises UserError."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): read_header(archive, name) for name in names}
    except Exception as error:  # zipfile raises many types on a damaged file
        raise UserError(f"{path}: damaged, or no .npz file ({reason(error)})") from None


def read_header(archive, name):
    try:
        with archive.open(name) as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
    except Exception:
        return None
    return Header(shape, dtype)


def read_member(path, name, header):
    """The array `name` of an .npz file. Raises UserError before allocating what the file cannot hold."""
    if header is None or header.dtype.hasobject:
        kind = "damaged" if header is None else "made of Python objects, which are not read"
        raise UserError(f"{path}: member {name} is {kind}")
    size = math.prod(header.shape) * header.dtype.itemsize
    try:
        with zipfile.ZipFile(path) as archive:
            held = archive.getinfo(f"{name}.npy").file_size
        if size > held:
            raise UserError(f"{path}: member {name} claims to be {header}, but holds {held:,} bytes")
        check_memory(f"{path}: member {name}", size)
        with np.load(path) as arrays:
            return arrays[name]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: member {name} is damaged ({reason(error)})") from None


def find_member(names, keys, part=None):
    """The first name that is one of `keys`, or with `part` ("train") also one such as train_images or x_train."""
    lower = {str(name).lower(): name for name in names}
    for key in keys:
        for wanted in [f"{part}_{key}", f"{key}_{part}"] if part else [key]:
            if wanted in lower:
                return lower[wanted]
    return None


def described(found):
    """Members of a file, a dict or a list in words."""
    return listed([f"{name} {header or 'damaged'}" for name, header in found.items()], 8) or "nothing"


#############################################
#              Images as bytes              #
#############################################


def channels_first(images, what):
    """Images [N, C, H, H] with 1 or 3 channels, of [N, H, H], channels last or first. Raises UserError if unclear."""
    shape = images.shape
    readings = []
    if images.ndim == 3 and shape[1] == shape[2]:
        readings.append(images[:, None])
    if images.ndim == 4 and shape[1] == shape[2] and shape[3] in (1, 3):
        readings.append(images.transpose(0, 3, 1, 2))
    if images.ndim == 4 and shape[2] == shape[3] and shape[1] in (1, 3):
        readings.append(images)
    if len(readings) != 1 or not images.size:
        raise UserError(f"{what}: images are {sides(shape)}; wanted N square ones with 1 or 3 channels: N x H x H, "
                        "N x H x H x C or N x C x H x H")
    return readings[0]


class Span(NamedTuple):
    """The values of an array."""

    low: float
    high: float
    whole: bool  # integers all


def span(array, what):
    """The Span of an array of numbers. Raises UserError for others, and what is not finite."""
    if array.dtype.kind not in "buif":
        raise UserError(f"{what}: values are {array.dtype}, wanted numbers")
    low, high = array.min().item(), array.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{what}: holds values that are not finite")
    return Span(low, high, array.dtype.kind != "f" or bool((array == np.rint(array)).all()))


def as_bytes(arrays, what):
    """(uint8 arrays, notes) of arrays of images, by what their values are; arrays of one type are read alike.

    Raises UserError for a range whose meaning is not clear.
    """
    spans = [span(array, what) for array in arrays]
    if len({array.dtype for array in arrays}) == 1:
        joint = Span(min(s.low for s in spans), max(s.high for s in spans), all(s.whole for s in spans))
        for its in spans:
            if not its.whole and its.high <= 1.001 < joint.high:
                raise UserError(f"{what}: values of the images go to {its.high:g} in one part and to {joint.high:g} in "
                                "another; wanted the same range in both")
        spans = [joint] * len(arrays)
    converted, notes = [], {}
    for array, its in zip(arrays, spans):
        images, change = eight_bits(array, its, what)
        converted.append(images)
        if change:
            notes[f"{what}: values of the images go from {its.low:g} to {its.high:g}: {change}"] = True
    return converted, list(notes)


def eight_bits(images, its, what):
    """(uint8 images, what was changed or None): of black and white, [0, 1], 0 to 255 or 16 bits."""
    if its.low == its.high:
        raise UserError(f"{what}: all values of the images are {its.low:g}")
    if its.whole and 0 <= its.low and its.high <= 1:
        return images.astype(np.uint8) * np.uint8(255), None
    if its.whole and 0 <= its.low and its.high <= 255:
        return images.astype(np.uint8, copy=False), None
    if -.001 <= its.low and its.high <= 1.001:
        return np.rint(images.clip(0, 1) * 255).astype(np.uint8), "kept in 8 bits"
    if 0 <= its.low and 128 <= its.high <= 255:
        return np.rint(images).astype(np.uint8), "rounded"
    if images.dtype.kind == "u" and images.dtype.itemsize == 2 and its.high >= 2 ** 15:
        return (images >> 8).astype(np.uint8), "of 16 bits the upper 8 are kept"
    raise UserError(f"{what}: values of the images ({images.dtype}) go from {its.low:g} to {its.high:g}; "
                    "wanted 0 to 255, [0, 1] or 16 bits, all of them used")


#############################################
#                   Labels                  #
#############################################


def class_numbers(arrays, what):
    """(arrays int64 [N], notes) of the labels of one dataset's parts: numbers, whole floats, one-hot rows or text.

    Text is numbered by class_order, over all parts. Raises UserError for what is no class.
    """
    columns = [array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array for array in arrays]
    for column in columns:
        if column.ndim not in (1, 2) or not column.size:
            raise UserError(f"{what}: labels are {sides(column.shape)}, wanted N, N x 1 or one-hot rows")
    if any(column.dtype.kind in "US" for column in columns):
        return from_text(columns, what)
    notes = []
    for i, column in enumerate(columns):
        if column.ndim == 2:
            columns[i] = from_one_hot(column, what)
            notes = [f"{what}: labels are one-hot rows of {column.shape[1]}"]
        elif not span(column, what).whole or abs(span(column, what).high) > 2 ** 60:
            raise UserError(f"{what}: labels are {column.dtype}, from {column.min()} to {column.max()}; wanted whole "
                            "numbers of classes")
    return [column.astype(np.int64) for column in columns], notes


def from_one_hot(rows, what):
    span(rows, what)
    if not (((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all()):
        raise UserError(f"{what}: labels are {rows.dtype} {sides(rows.shape)}, but not one-hot rows")
    return rows.argmax(1)


def from_text(columns, what):
    if any(column.dtype.kind not in "US" or column.ndim != 1 for column in columns):
        raise UserError(f"{what}: labels are {listed(Header(c.shape, c.dtype) for c in columns)}; wanted text in all "
                        "or in none")
    texts = [np.char.decode(column, "utf-8", "replace") if column.dtype.kind == "S" else column for column in columns]
    names = class_order({str(name) for text in texts for name in np.unique(text)})
    number = {name: i for i, name in enumerate(names)}
    numbers = [np.array([number[str(name)] for name in text], np.int64) for text in texts]
    return numbers, [f"{what}: labels are text, numbered {numbered(names)}"]


def numbered(names):
    """Class names with their numbers, in words."""
    return listed((f"{i} {name}" for i, name in enumerate(names)), 10)
