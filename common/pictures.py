"""Pictures in class folders as arrays: every format that PIL reads, sizes, depths, palettes and transparency."""
import contextlib
import functools
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .arrays import class_order, sides
from .bars import along
from .errors import UserError, listed
from .files import check_memory, check_regular, reason

FORMATS = ("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI",
           "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM")  # those that start no other program
SYSTEM = ("__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found")
STRIP = 64  # times longer than wide: no picture
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}  # how a picture is turned, by its Exif orientation

#############################################
#                  Surprises                #
#############################################


class Surprises:
    """What is not as expected, by kind, with the files it is about."""

    def __init__(self):
        self.files = {}

    def add(self, kind, file):
        self.files.setdefault(kind, []).append(file)

    def lines(self):
        return [self.line(kind, files) for kind, files in self.files.items()]

    @staticmethod
    def line(kind, files):
        place = os.path.commonpath([file.parent for file in files])
        return f"{place}: {kind}: {len(files):,} ({listed((file.relative_to(place) for file in files), 3)})"


#############################################
#               Class folders               #
#############################################


@functools.cache
def readable():
    """(formats, suffixes) of the pictures that are read."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    return formats, {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def is_picture(file):
    return file.suffix.lower() in readable()[1]


def visible(folder):
    """What users have put into a folder, sorted: not what systems, editors and archives leave there."""
    try:
        places = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    return [place for place in places if not (place.name.startswith(".") or place.name in SYSTEM)]


def pictures_below(folder, surprises):
    """All pictures in a folder and the folders in it. What else is there is a surprise."""
    pictures = []
    for place in visible(folder):
        if place.is_symlink() and os.path.isdir(place):
            surprises.add("links to folders, not followed", place)
        elif os.path.isdir(place):
            pictures += pictures_below(place, surprises)
        elif not is_picture(place):
            surprises.add("files that are no pictures, left out", place)
        elif not os.path.isfile(place):
            surprises.add("pipes, devices and dead links, left out", place)
        else:
            pictures.append(place)
    return pictures


def class_files(folder, surprises, wanted=None):
    """{class: its pictures} of <folder>/<class>/**, or as Tiny-ImageNet's val_annotations.txt says."""
    annotations = folder / "val_annotations.txt"
    if os.path.isfile(annotations):
        return annotated_files(folder, annotations, surprises)
    found = {}
    for place in visible(folder):
        if os.path.isdir(place) and wanted and place.name not in wanted:
            surprises.add("other classes, left out", place)
        elif os.path.isdir(place):
            found[place.name] = pictures_below(place, surprises)
            if not found[place.name]:
                surprises.add("folders without a picture, no classes", place)
        elif is_picture(place):
            surprises.add("pictures outside of the class folders, left out", place)
    return {name: files for name, files in found.items() if files}


def annotated_files(folder, annotations, surprises):
    """Tiny-ImageNet's validation set: images/<file>, whose class stands in lines of file, class, box."""
    try:
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
        class_of = {row[0]: row[1] for row in rows}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{annotations}: not lines of a file and its class ({reason(error)})") from None
    files = {file.name: file for file in pictures_below(folder / "images", surprises)}
    for name in files.keys() - class_of.keys():
        surprises.add("pictures without a class, left out", files[name])
    for name in class_of.keys() - files.keys():
        surprises.add("pictures that are not there", folder / "images" / name)
    found = {name: [] for name in class_of.values()}
    for name in sorted(files.keys() & class_of.keys()):
        found[class_of[name]].append(files[name])
    return {name: files for name, files in found.items() if files}


def same_classes(folders, listings, wanted=None):
    """The classes, in their order, of folders that must hold the same ones: those `wanted`, or of the first folder."""
    expected = wanted or listings[0].keys()
    for folder, listing in zip(folders, listings):
        missing = [name for name in expected if name not in listing]
        added = [name for name in listing if name not in expected]
        if missing:
            raise UserError(f"{folder}: no pictures of class {listed(missing)}")
        if added:
            raise UserError(f"{folders[0]}: no pictures of class {listed(added)}, which {folder.name} has")
    return class_order(expected)


def inside(folder):
    """What a folder holds, in words."""
    return listed(place.name for place in visible(folder)) or "nothing"


def read_folders(folders, size=None, channels=None, wanted=None):
    """([(images uint8 [N, C, size, size], labels int64 [N])] of folders with the same classes, class names, notes).

    Without `size`, that of all the pictures; else the shorter side is resized to it and the centre cut out. Without
    `channels`, one if all the pictures are grey, else three. `wanted`: names of the only classes read.
    Raises UserError.
    """
    surprises = Surprises()
    listings = [class_files(folder, surprises, wanted) for folder in folders]
    for folder, listing in zip(folders, listings):
        if not listing:
            raise UserError("; ".join([f"{folder}: no pictures in class folders (holds {inside(folder)})",
                                       *surprises.lines()]))
    classes = same_classes(folders, listings, wanted)
    looks, labels = [], []
    for folder, listing in zip(folders, listings):
        files = [file for name in classes for file in listing[name]]
        looks.append([look(file, surprises) for file in along(files, f"looking at {folder.name}", delay=1)])
        labels.append(np.repeat(np.arange(len(classes)), [len(listing[name]) for name in classes]))
    everything = [its for part in looks for its in part]
    size = size or common_side(folders[0].parent, everything)
    channels = channels or (1 if all(its.grey for its in everything) else 3)
    check_memory(f"{folders[0].parent}: {len(everything):,} images of {channels} x {size} x {size}",
                 len(everything) * channels * size ** 2)
    images = [decode_all(part, size, channels, f"decoding {folder.name}", surprises)
              for part, folder in zip(looks, folders)]
    return list(zip(images, labels)), classes, surprises.lines()


def common_side(place, looks):
    """The side of pictures that are all square and of one size. Raises UserError naming the sizes there are."""
    sizes = Counter(its.size for its in looks)
    (width, height), _ = sizes.most_common(1)[0]
    if len(sizes) > 1 or width != height:
        raise UserError(f"{place}: pictures are {listed((sides(size) for size, _ in sizes.most_common()), 3)} pixels; "
                        "--image-size says to which side in pixels they are resized and cut")
    return width


#############################################
#                One picture                #
#############################################


class Look(NamedTuple):
    """What the head of a picture's file tells."""

    file: Path
    size: tuple  # width, height
    grey: bool


@contextlib.contextmanager
def opened(file):
    """The picture in a file. Raises UserError, inside too, for one that is damaged or larger than any should be."""
    check_regular(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=readable()[0]) as picture:
                yield picture
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{file}: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # PIL raises almost any type on a damaged file
        raise UserError(f"{file}: not a readable picture ({reason(error)})") from None


def opens_as_picture(file):
    """Whether a file without a picture's suffix is one."""
    try:
        with opened(file):
            return True
    except UserError:
        return False


def look(file, surprises):
    with opened(file) as picture:
        if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
            surprises.add("pictures of several frames, of which the first is read", file)
        if max(picture.size) > STRIP * min(picture.size):
            raise UserError(f"{file}: {sides(picture.size)} pixels are no picture")
        grey = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith(("I", "F"))
        return Look(file, picture.size, grey)


def decode_all(looks, size, channels, title, surprises):
    """Images uint8 [N, channels, size, size] of pictures."""
    images = np.empty((len(looks), channels, size, size), np.uint8)
    for image, its in zip(images, along(looks, title, delay=1)):
        image[:] = in_channels(decode(its.file, surprises, size), channels, its.file)
    return images


def in_channels(image, channels, file):
    """An image [1 or 3, H, W] in so many channels. Raises UserError for colours where there is one."""
    if len(image) < channels:
        return image.repeat(channels, 0)
    if len(image) > channels and (image != image[:1]).any():
        raise UserError(f"{file}: a coloured picture, wanted grey ones")
    return image[:channels]


def decode(file, surprises, size=None):
    """A picture as uint8 [1 or 3, H, W]; with `size`, resized and cut to it."""
    with opened(file) as picture:
        flat = flattened(picture, file, surprises)
        orientation = picture.getexif().get(0x0112)
        if orientation in UPRIGHT:
            surprises.add("pictures that a turned camera took (Exif), turned upright", file)
            flat = flat.transpose(Image.Transpose[UPRIGHT[orientation]])
        if size and flat.size != (size, size):
            surprises.add(f"pictures resized to {size} x {size}, their centre cut out", file)
            flat = fit(flat, size)
        pixels = np.asarray(flat)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def flattened(picture, file, surprises):
    """A picture of 8 bits, grey or RGB: of 16 bits the upper 8, transparent parts on white."""
    sixteen = picture.mode.startswith("I;16") or picture.mode == "I" and picture.format in ("PNG", "PPM")
    if sixteen:
        surprises.add("pictures of 16 bits, of which the upper 8 are read", file)
        values = np.asarray(picture)
        if values.max() < 2 ** 12:
            surprises.add("pictures of 16 bits with values below 4,096, nearly black in the upper 8", file)
        return Image.fromarray((values >> 8).astype(np.uint8))
    if picture.mode.startswith(("I", "F")):
        raise UserError(f"{file}: pixels of 32 bits (mode {picture.mode}), wanted 8 or 16")
    mode = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    if "transparency" in picture.info or picture.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        layer = picture.convert("RGBA")
        if layer.getchannel("A").getextrema()[0] < 255:
            surprises.add("pictures with transparent parts, laid on white", file)
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert(mode)


def fit(picture, size):
    """A picture whose shorter side is resized to `size`, and the centre cut out."""
    if picture.size == (size, size):
        return picture
    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.BILINEAR)
    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))
