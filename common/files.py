"""Files that are never half-written: atomic saving, safe loading, what is still valid of an earlier run."""
import contextlib
import csv
import io
import json
import os
import time
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
        torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


def save_csv(path, rows):
    """Save a list of dicts with the same keys as a table, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def load(path, device="cpu"):
    """Read a .pt, .json or .npz file. No code in it is ever run. UserError when missing or damaged."""
    path = Path(path)
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays}
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch.load and np.load raise almost any type on a damaged file
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"{path}: damaged, or not a {path.suffix or '.pt'} file of plain tensors ({reason})") from None


def read_csv(path, needed):
    """Rows of a table of numbers as floats, empty cells left out. UserError when a row lacks one of the columns `needed`."""
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

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{path.parent} is in use by another process; choose another --out, or wait") from None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
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
