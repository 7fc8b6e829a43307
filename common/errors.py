"""What is said to users: errors they can mend, and surprises."""
import sys

import torch


class UserError(Exception):
    """A mistake the user can mend: one clear line on stderr, exit code 2."""


def plain(text):
    """`text` in one line, in which no control code of a file's name reaches the terminal."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in line)


def first_line(error):
    """The beginning of what an exception says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]


def is_of_memory(error):
    """Whether an exception says that there is not enough memory, on a GPU or beside it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("enough memory", "can't allocate memory"))


def note(*texts):
    """A line each on stderr about surprises: what was found, and what is done about it."""
    for text in texts:
        print(f"note: {plain(text)}", file=sys.stderr)


def listed(items, most=5):
    """Names in words, of many the first few: "a, b, c, ... (12 in all)"."""
    items = [str(item) for item in items]
    if len(items) <= most:
        return ", ".join(items)
    return f"{', '.join(items[:most])}, ... ({len(items)} in all)"
