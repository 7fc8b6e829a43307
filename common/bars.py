"""How far a piece of work has come: tqdm's bar on a terminal, plain lines in a file, a pipe or under Slurm."""
import sys
import time

from tqdm import tqdm

EVERY = 60  # seconds between two plain lines


class Bar:
    """tqdm's bar where stderr is a terminal; where stdout is none, a plain line a minute there, and those of `say`.

    A context manager. `total` may change on the way.
    """

    def __init__(self, title, total, done=0, unit="it", leave=False, delay=0):
        self.title, self.total, self.done, self.unit, self.figures = title, total, done, unit, {}
        self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, disable=None, leave=leave, delay=delay)
        self.lines = None if sys.stdout.isatty() else sys.stdout
        self.began = self.said = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def update(self, n=1, **figures):
        """Move on by `n`; `figures` {name: text} are shown from now on."""
        self.done += n
        self.figures |= figures
        if not self.bar.disable:
            self.bar.total = self.total
            self.bar.set_postfix(self.figures, refresh=False)
            self.bar.update(n)
        self.tick()

    def tick(self):
        """To be called often: says the minute's plain line when it is time. True when it was."""
        due = time.monotonic() - self.said >= EVERY
        if due:
            self.say()
        return due

    def say(self):
        """A plain line of where the work is, where there is no terminal; out of every buffer at once."""
        self.said = time.monotonic()
        if self.lines:
            figures = "".join(f", {name.replace('_', ' ')} {text}" for name, text in self.figures.items())
            seconds = self.said - self.began
            print(f"{self.title}: {self.unit} {self.done} of {self.total}{figures}, {seconds:.0f} s", file=self.lines,
                  flush=True)


def along(items, title, delay=0):
    """Yield every one of the `items` under a bar."""
    with Bar(title, len(items), delay=delay) as bar:
        for item in items:
            yield item
            bar.update()
