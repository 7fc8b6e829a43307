"""The course of a training, epoch by epoch: curves.csv beside its result, and TensorBoard's files if asked for."""
import contextvars
import csv
import io

from . import files, ranks
from .errors import UserError

COLUMNS = ("what", "step", "epoch", "loss", "accuracy", "lr", "images_per_second")
NO_TABLE = f"not a table of curves ({', '.join(COLUMNS)}); move it away"
log = contextvars.ContextVar("log", default=None)  # where else: "tensorboard", or nowhere


def choose_log(name):
    """From here on curves go to `name` too, as --log says. Raises UserError when its package is missing."""
    if name == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UserError("--log tensorboard: the package is not there (pip install tensorboard)") from None
    log.set(name)


class Curve:
    """The rows of the training `what` on their way to the table `path`, which others append to as well.

        with Curve(path, "round 1") as curve:
            curve.add(1, step=4, loss=..., accuracy=..., lr=..., images_per_second=...)

    The training goes on after `epoch`: what an earlier try left of later epochs is dropped. Of several ranks the first
    one writes.
    """

    def __init__(self, path, what, epoch=0):
        self.path, self.what, self.epoch = path, what, epoch
        self.rows, self.autosave, self.events = [], files.Autosave(seconds=1), None

    def __enter__(self):
        if ranks.is_first():
            drop_later(self.path, self.what, self.epoch)
            self.events = events_writer(self.path, self.what, self.epoch)
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.flush()
        except UserError:
            if error is None:  # else why the training ended is what has to be said
                raise
        finally:
            if self.events:
                self.events.close()

    def add(self, epoch, **values):
        """The row of an epoch; `values` are the other columns but `what`. Written once a second, and by `flush`."""
        self.rows.append({"what": self.what, "epoch": epoch} | values)
        if self.events:
            for name in values.keys() - {"step"}:
                self.events.add_scalar(name, values[name], epoch)
        if self.autosave.due():
            self.flush()

    def flush(self):
        """Append the rows to the table, before anything is saved that goes on after them."""
        rows, self.rows = self.rows, []
        if rows and ranks.is_first():
            with table(self.path):
                append(self.path, rows)


def table(path):
    """A lock under which one process at a time changes the table."""
    return files.locked(path.with_name(f".{path.name}.lock"), wait=True)


def as_text(rows, header):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def append(path, rows):
    """Add rows to a table, with its header at the top, in place of a line left unfinished. Raises UserError."""
    try:
        with open(path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(as_text(rows, header=file.tell() == 0).encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read(path):
    """The rows of a table, as text; a line that a killed process left unfinished is none."""
    if not path.exists():
        return []
    files.check_regular(path)
    try:
        whole, newline, _ = path.read_text().rpartition("\n")
        reader = csv.DictReader(io.StringIO(whole + newline))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}: {NO_TABLE}") from None
    if whole and tuple(reader.fieldnames or ()) != COLUMNS or not all(map(is_whole, rows)):
        raise UserError(f"{path}: {NO_TABLE}")
    return rows


def is_whole(row):
    """Whether a row has all columns, no more, and counts its epoch."""
    return None not in row and None not in row.values() and row["epoch"].isdigit()


def drop_later(path, what, epoch):
    """Remove the epochs after `epoch` of the training `what` from a table."""
    if not path.exists():
        return
    with table(path):
        kept = [row for row in read(path) if row["what"] != what or int(row["epoch"]) <= epoch]
        text = as_text(kept, header=True)
        if text != path.read_text():
            files.write_atomically(path, text.encode())


def events_writer(path, what, epoch):
    """TensorBoard's writer in <folder>/tensorboard/<what>, whose later epochs are dropped likewise; or None."""
    if log.get() != "tensorboard":
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(path.parent / "tensorboard" / what.replace(" ", "_"), purge_step=epoch + 1)
