"""A training step as a CUDA graph: one launch for all its kernels, which would take longer to launch than to run.

All that changes from step to step are tensors side by side in a row of bytes on the GPU; a graph reads them from a row
of its own, into which the next one is copied. On a CPU nothing is captured.
"""
import random
import sys
from typing import NamedTuple

import numpy as np
import torch

from .errors import first_line
from .streams import global_generators_kept

WARM_UP = 3  # steps before a capture, in which cuDNN chooses its ways and libraries take their memory

#############################################
#           Tensors in one row              #
#############################################


class Row(NamedTuple):
    """The tensors of a NamedTuple, each from a multiple of 16 bytes on."""

    bytes: torch.Tensor
    like: tuple  # the NamedTuple, on the CPU

    def shapes(self):
        return tuple(None if part is None else tuple(part.shape) for part in self.like)

    def views(self):
        """A NamedTuple like the one given whose tensors are views of the bytes."""
        parts, start = [], 0
        for part in self.like:
            size = 0 if part is None else part.numel() * part.element_size()
            place = self.bytes[start:start + size]
            parts.append(None if part is None else place.view(part.dtype).view(part.shape))
            start += size + -size % 16
        return type(self.like)(*parts)


def rows_on(device, batches):
    """The Rows of `batches`, NamedTuples of tensors or None: gone up to `device` in one copy that nobody waits for."""
    rows = [bytes_of(batch) for batch in batches]
    together = torch.frombuffer(bytearray().join(rows), dtype=torch.uint8)
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    return [Row(row, batch) for row, batch in zip(together.split([len(row) for row in rows]), batches)]


def bytes_of(batch):
    parts = [part.numpy().tobytes() for part in batch if part is not None]
    return b"".join(part + bytes(-len(part) % 16) for part in parts)


#############################################
#                 The graph                 #
#############################################


class CudaGraph:
    """`function()`, captured but not run; a call runs it and returns its results, always the same tensors."""

    def __init__(self, function):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = function()

    def __call__(self):
        self.graph.replay()
        return self.results


GRAPHS = {"cuda": CudaGraph}


def can_capture(device):
    """Whether steps on this device are captured."""
    return device.type in GRAPHS


class Captured:
    """`step`, a function (NamedTuple of tensors) -> tensors, as one graph for each shape of the Row it is called with.

    `twin()` gives a copy of the network and of its step, in whose place libraries warm up: the first replay finds all
    as it was. A step that cannot be captured is called as it is, and it is said once.
    """

    def __init__(self, step, twin):
        self.step, self.twin = step, twin
        self.graphs = {}  # {shapes: (the row it reads, graph)}; None when there can be none

    def __call__(self, row):
        shapes = row.shapes()
        if self.graphs is not None and shapes not in self.graphs:
            self.capture(row)
        if self.graphs is None:
            return self.step(row.views())
        own, graph = self.graphs[shapes]
        own.copy_(row.bytes)
        return [result.clone() for result in graph()]

    def capture(self, row):
        """Add the graph of rows of this shape, or give all graphs up."""
        try:
            warm_up(*self.twin(), row.views())
            own = Row(row.bytes.clone(), row.like)
            views = own.views()
            self.graphs[row.shapes()] = own.bytes, GRAPHS[own.bytes.device.type](lambda: self.step(views))
        except torch.OutOfMemoryError:
            raise  # without a graph it would not be enough either, or soon no more
        except Exception as error:  # the forward of somebody's network may do anything
            print(f"training: no CUDA graph, so slower: {first_line(error)}", file=sys.stderr)
            self.graphs = None


def warm_up(network, step, batch):
    """Make steps that nobody needs; the generators are left as they are.

    Raises RuntimeError where they wait for the GPU, or draw or count on the host, which a graph would not repeat.
    """
    device = batch[0].device
    with global_generators_kept():
        if device.type == "cuda":
            warm_up_cuda(step, batch)
        before = host_state(network)
        step(batch)
        if host_state(network) != before:
            raise RuntimeError("the network draws random numbers or counts on the host")


def warm_up_cuda(step, batch):
    """Steps on a stream of their own, all but the first of which may not wait for the GPU."""
    stream, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step(batch)
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)


def host_state(network):
    """What a forward may leave changed on the host: generators, and plain values among the attributes of modules."""
    plain = [{name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
             for module in network.modules()]
    numpy = np.random.get_state()
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().numpy().tobytes(), plain
