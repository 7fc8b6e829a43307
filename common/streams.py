"""Random numbers: a stream of its own for every purpose, all from one seed."""
import contextlib
import hashlib
import random

import numpy as np
import torch


def random_stream(seed, *purpose):
    """A CPU generator for one purpose, e.g. random_stream(3, "order", round).

    Streams of different purposes are independent, so a resumed round draws what it would have drawn.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def global_generators_kept():
    """What happens inside leaves the global generators of torch, NumPy and Python as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_everything(seed):
    """Seed the global generators, which modules such as dropout draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2 ** 32)
    random.seed(seed)


def seed_from(generator, model):
    """Seed the global generators, and those that modules hold, by the state of `generator`, which stays as it is.

    What they give repeats with it.
    """
    digest = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
    seed = int.from_bytes(digest[:4], "big")
    seed_everything(seed)
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, torch.Generator):
                held.manual_seed(seed)
            elif isinstance(held, random.Random):
                held.seed(seed)
            elif isinstance(held, np.random.Generator):
                held.bit_generator.state = type(held.bit_generator)(seed).state
