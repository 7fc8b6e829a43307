"""Files that are never half-written: atomic saving, safe loading, what is still valid of an earlier run."""
import contextlib
import csv
import io
import json
import os
import re
import stat
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from . import ranks
from .errors import UserError

#############################################
#              Writing, reading             #
#############################################


def write_atomically(path, content):
    """Write bytes to `path` so that a reader, or a power cut, sees the old file or the new one.

    Of several ranks that work together, the first one writes.
    """
    if ranks.current().rank:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process leaves is replaced by the next
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def save(path, value):
    """Save `value` atomically in the format of the suffix: .json, .npz (a dict), .png (a figure) or .pt."""
    buffer = io.BytesIO()
    suffix = Path(path).suffix
    if suffix == ".json":
        buffer.write(json.dumps(value, indent=2).encode() + b"\n")
    elif suffix == ".npz":
        np.savez_compressed(buffer, **value)
    elif suffix == ".png":
        value.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    else:
        torch.save(on_cpu(value), buffer)
    write_atomically(path, buffer.getvalue())


def on_cpu(value):
    """`value` with the tensors in its dicts, lists and tuples on the CPU: a file opens on a machine without a GPU."""
    if torch.is_tensor(value):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value


def save_csv(path, rows):
    """Save a list of dicts with the same keys as a table, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


# What NumPy's numbers and arrays are made of in a pickle, under the names of all its versions: data, no code.
NUMPY = [np.dtype, np.ndarray, *{type(np.dtype(code)) for code in "?bhilqBHILQefdgU"}]
for maker in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]):  # scalar, _reconstruct
    NUMPY += [(maker, f"numpy.{core}.multiarray.{maker.__name__}") for core in ("core", "_core")]


def load(path, device="cpu"):
    """Read a .pt, .json or .npz file, by its suffix. No code in it is ever run. UserError when missing or damaged."""
    path = Path(path)
    check_regular(path)
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays}
        return load_tensors(path, device)
    except UserError:
        raise
    except Exception as error:  # torch.load and np.load raise almost any type on a damaged file
        kind = "a JSON file" if path.suffix == ".json" else "a file of plain tensors"
        raise UserError(f"{path}: damaged, or not {kind} ({reason(error)})") from None


def load_format(path, name, complaint, device="cpu"):
    """The dict in a file whose "format" is `name`. Raises UserError with the `complaint` for any other file."""
    held = load(path, device)
    if not isinstance(held, dict) or held.get("format") != name:
        raise UserError(f"{path}: {complaint}")
    return held


def load_tensors(path, device="cpu"):
    """What torch.save wrote: tensors, NumPy's arrays and numbers, and plain values. Raises almost any type."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_memory(path, sum(member.file_size for member in archive.infolist()))
            if archive.testzip():  # torch.load does not look
                raise UserError(f"{path}: damaged: the checksum of {archive.testzip()} in it does not fit")
    with torch.serialization.safe_globals(NUMPY), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old and sparse tensors
        return torch.load(path, map_location=device, weights_only=True)


def reason(error):
    """What an exception says, in a few words."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # what torch.load is about, after much advice
    code = re.search(r"GLOBAL (\S+)", text)
    if text.startswith("Unsupported operand"):  # the first byte that no pickle has
        return "no file of torch.save"
    if code:
        return f"it holds a {code[1]}, whose code is not run"
    line = text.split("\n")[0][:100]
    return line if re.search("[a-z]", line) else "unreadable"


def check_regular(path):
    """Raises UserError unless `path` is a file with an end: a pipe or a device would be waited for."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise UserError(f"{str(path)[:200]}: {'no such file' if missing else reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not a file")


def check_memory(what, size):
    """Raises UserError when `size` bytes are more than this machine has."""
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > held:
        raise UserError(f"{what}: needs {size / 2 ** 30:,.1f} GiB of memory, this machine has {held / 2 ** 30:,.1f}")


def read_csv(path, needed):
    """Rows of a table of numbers as floats, empty cells left out. UserError when a row lacks a column of `needed`."""
    check_regular(path)
    try:
        with open(path, newline="") as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of numbers ({error})") from error
    for column in needed:
        if not rows or any(column not in row for row in rows):
            raise UserError(f"{path}: no column {column} in {len(rows)} rows; wanted {', '.join(needed)}")
    return rows


def read_settings(path):
    """The JSON object in a file. Raises UserError."""
    settings = load(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a {type(settings).__name__}, wanted a JSON object of settings")
    return settings


#############################################
#            Going on after a stop          #
#############################################


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold the lock file `path`, which is gone afterwards; the system frees it however the process ends.

    Another process that holds it is waited for with `wait`, else it raises UserError.
    """
    import fcntl

    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")
        except OSError as error:
            raise UserError(f"cannot write in {path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{path.parent} is in use by another process; choose another --out, or wait") from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()  # who held it has removed it meanwhile
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def owned(folder):
    """Keep other processes out of a folder of results while this one (of several ranks the first) works in it."""
    if not ranks.is_first():
        yield
        return
    with locked(Path(folder) / ".lock"):
        yield


def difference(earlier, wanted, ignored=()):
    """The first key, in alphabetical order, whose value in the dict `earlier` is not the one `wanted`; or None."""
    for key in sorted((earlier.keys() | wanted.keys()) - set(ignored)):
        if earlier.get(key) != wanted.get(key):
            return key
    return None


class Autosave:
    """Says when it is time to save again: `due()` once in `seconds`."""

    def __init__(self, seconds=30):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self):
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
