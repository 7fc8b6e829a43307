"""Independent runs at the same time on one GPU: seeds and data orders, whose small networks alone do not fill it.

Each is the code it is alone, in a thread with a CUDA stream of its own. One thread works at a time, and hands on when
it has asked the GPU for some steps, or would wait for it: a run's draws, steps and bits are those it has alone, and the
GPU makes the steps of all side by side. A CPU is filled by one run, and does them in order.
"""
import contextlib
import contextvars
import functools
import gc
import signal
import sys
import threading
from collections import deque

import torch

from . import captured, interrupts, ranks
from .streams import global_generators_kept

MOST = 16  # runs at a time
STEPS = 8  # that one asks for before it hands on: to wake a thread takes as long as to ask for one or two

#############################################
#                 All of them               #
#############################################


def pays(device):
    """Whether runs on this device are done together."""
    return captured.can_capture(device) and ranks.current().size == 1


def each(function, items, device, title, steps=1):
    """Call `function` of every one of the items: together where that pays, else in order; under torchrun shared out.

    `title` and `steps` are those of ranks.share. Called again after an exception, `function` goes on where it was.
    """
    if pays(device):
        take_turns([functools.partial(function, item) for item in dict.fromkeys(items)], device)
        return
    for item in ranks.share(items, title, steps):
        function(item)


def take_turns(functions, device):
    """Call the functions together, as many at a time as there is memory for; the others wait until one is done.

    What one raises stops all of them, which then save what they have trained, and is raised.
    """
    most, waiting, errors = MOST, deque(functions), []
    ring, one_ended = deque(), threading.Semaphore(0)
    with global_generators_kept(), interrupts.deferred() as asked:
        def asked_to_stop():
            return asked() or (signal.SIGTERM if errors else None)

        while ring or waiting and not asked_to_stop():
            while waiting and len(ring) < most and not asked_to_stop():
                ring.append(Run(waiting.popleft(), device, ring, one_ended, asked_to_stop))
            ring[0].turn.release()
            one_ended.acquire()
            run = ring.popleft()
            run.join()
            if isinstance(run.error, torch.OutOfMemoryError) and ring:
                waiting.append(run.function)
                if most == MOST:
                    print("no memory for all networks at once: fewer at a time", file=sys.stderr)
                most = len(ring)
                run = None
                gc.collect()  # the tensors that its exception held
            elif run.error:
                errors.append(run.error)
    if errors:
        raise errors[0]


#############################################
#                 One of them               #
#############################################


class Run(threading.Thread):
    """A function in a thread of the `ring`, whose first one works. `error` is what the function raised, or None."""

    def __init__(self, function, device, ring, one_ended, asked_to_stop):
        super().__init__(daemon=True)
        self.function, self.device, self.asked_to_stop = function, device, asked_to_stop
        self.ring, self.one_ended, self.turn = ring, one_ended, threading.Semaphore(0)
        self.context, self.error = contextvars.copy_context(), None
        self.start()

    def hand_on(self):
        self.ring.rotate(-1)
        self.ring[0].turn.release()
        self.turn.acquire()

    def run(self):
        self.turn.acquire()
        try:
            self.context.run(self.work)
        except BaseException as error:  # for the main thread to raise
            self.error = error
        self.one_ended.release()

    def work(self):
        interrupts.asked.set(self.asked_to_stop)
        with own_stream(self.device):
            self.function()


def hand_on():
    """To be called before the GPU is waited for, and every STEPS steps: the others ask for theirs."""
    thread = threading.current_thread()
    if isinstance(thread, Run):
        thread.hand_on()


def wait_before_drawing():
    """To be called before a step that may draw on a GPU: graphs of all streams read their seed in one place."""
    thread = threading.current_thread()
    if isinstance(thread, Run) and thread.device.type == "cuda":
        torch.cuda.synchronize(thread.device)


@contextlib.contextmanager
def own_stream(device):
    """A GPU does what is asked of it inside on a stream of its own, after what came before; waited for at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()
