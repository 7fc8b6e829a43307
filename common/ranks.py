"""Many processes: what the ranks that torchrun starts share out, add up and wait for. Without torchrun: nothing."""
import contextlib
import contextvars
import io
import os
import sys
import time
from datetime import timedelta
from typing import Callable, NamedTuple

import torch

from .bars import Bar
from .errors import UserError


class Ranks(NamedTuple):
    """The processes that work on one thing together: all that torchrun started or, inside `share`, one for itself.

    Files are written, tables printed and bars shown by rank 0 alone. Without torchrun there is no other.
    """

    rank: int = 0
    size: int = 1
    store: object = None  # counters and texts that all ranks see
    step: Callable = lambda n=1: None  # inside `share`: moves the bar of all ranks


together = contextvars.ContextVar("together", default=Ranks())


def current():
    """The Ranks that this process belongs to now."""
    return together.get()


def is_first():
    """Whether this process writes the files and prints the tables."""
    return current().rank == 0


def own_part():
    """The slice of images or points that this rank works on."""
    return slice(current().rank, None, current().size)


@contextlib.contextmanager
def all_ranks():
    """Join the processes that torchrun started: gloo for tensors on a CPU, nccl on GPUs, a device a rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    store, rank, size = next(torch.distributed.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # a restarted group must not meet its dead self
        store = torch.distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # However long one waits for another: when a rank dies, torchrun ends them all.
    torch.distributed.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(days=365))
    together.set(Ranks(rank, size, store))
    with silence() if rank else contextlib.nullcontext():
        yield
    wait()
    torch.distributed.destroy_process_group()


def own_gpu():
    """The number of this rank's GPU. Raises UserError where torchrun started more ranks than there are GPUs."""
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"torchrun started more ranks than GPUs, which they do not share; take "
                        f"--nproc-per-node={count}, or --device cpu")
    return number


@contextlib.contextmanager
def silence(speech=None):
    """Show no bars and no warnings; what is printed goes to `speech`, or nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        with contextlib.redirect_stdout(nowhere if speech is None else speech):
            yield


@contextlib.contextmanager
def alone(**options):
    """Here a rank works for itself, as one process would."""
    before = together.set(Ranks(**options))
    try:
        yield
    finally:
        together.reset(before)


def print_once(text):
    """Print to stderr what every rank may have to say."""
    store = current().store
    if store is None or store.add(text, 1) == 1:
        print(text, file=sys.stderr)


def share(items, title, steps=1):
    """Yield every item on one of the ranks, which handles it as one process would. Ends when all ranks are done.

    What the loop prints, the first rank prints in the items' order. The bar of all ranks counts `steps` for an item,
    as current().step() reports them or, at the latest, when the item is done.
    """
    ranks, items = current(), list(items)
    if ranks.size == 1:
        yield from items
        return
    left = 0

    def step(n=1):
        nonlocal left
        left -= n
        bar.update(ranks.store.add(title, n) - bar.done)

    with Bar(title, len(items) * steps) as bar:
        for i in range(ranks.rank, len(items), ranks.size):
            left, speech = steps, io.StringIO()
            with alone(step=step), silence(speech):
                yield items[i]
            step(left)
            ranks.store.set(f"{title} {i}", speech.getvalue())
        wait_for_others(ranks, step)
    if ranks.rank == 0:
        for i in range(len(items)):
            print(ranks.store.get(f"{title} {i}").decode(), end="")


def wait_for_others(ranks, step):
    """Wait until every rank has come here; the first one moves the bar meanwhile."""
    others = torch.distributed.all_reduce(torch.zeros(1), async_op=True)
    while ranks.rank == 0 and not others.is_completed():
        time.sleep(.1)
        step(0)
    others.wait()


def sum_over_ranks_(tensor):
    """Add up `tensor` over the ranks, in place."""
    if current().size > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def wait():
    """Wait for all ranks."""
    sum_over_ranks_(torch.zeros(1))


def broadcast(value):
    """The first rank's value as a float64 tensor, for what all must decide alike."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return sum_over_ranks_(torch.zeros_like(value) if current().rank else value)
