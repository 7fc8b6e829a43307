"""Ctrl-C, SIGTERM (Slurm, spot machines), SIGHUP (a lost connection): a training ends its step and saves; everything
else stops at once."""
import contextlib
import contextvars
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
asked = contextvars.ContextVar("asked", default=lambda: None)  # in a thread: what the main one, which waits, was asked


class Stopped(KeyboardInterrupt):
    """The process was asked to stop by the signal `number`."""

    def __init__(self, number):
        super().__init__()
        self.number = number


def stop(number, frame):
    raise Stopped(number)


def heeded():
    """The signals that stop the process: those that nohup and the like have not told it to ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def install():
    """From here on the signals raise Stopped."""
    for number in heeded():
        signal.signal(number, stop)


@contextlib.contextmanager
def deferred():
    """Inside, the signals wait: the function given says which one has come, or None. Afterwards it raises Stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield asked.get()
        return
    came = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in heeded()}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise Stopped(came[0])
