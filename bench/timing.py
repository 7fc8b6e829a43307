"""How long something takes, and how much memory; on a GPU by events, and beside it the floor, the least it could take.

The floor holds every tensor that a kernel reads or writes, once, and every operation of products and convolutions,
against the rates that the same GPU reaches in the same run in a copy and in a product of large float32 matrices. It is
of the kernels that are asked for: fewer of them have a lower one.
"""
import functools
import resource
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

READ_IN_PART = ("index", "index_select", "gather")  # as much of the first tensor as is taken of it
NOT_READ = ("copy_", "fill_", "zero_", "combine_")  # whose first tensor is only written


def choose(name):
    """The device of this name, on which float32 is float32, as in the scripts."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return torch.device(name)


def seconds(function, device):
    """Seconds of one call."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def peak_memory(device):
    """MiB, of the process or on the GPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    return torch.cuda.max_memory_allocated(device) / 2 ** 20


def floor(function, took, device):
    """On a GPU what to print behind the `took` seconds of function(), which is called for it; elsewhere nothing."""
    if device.type == "cpu":
        return ""
    moved, operations = counted(function)
    bandwidth, rate = rates(device)
    least = max(moved / bandwidth, operations / rate)
    return (f"  floor {least * 1e3:9.3f} ms ({moved / 1e6:,.0f} MB, {operations / 1e9:,.1f} GFLOP): "
            f"x {took / least:.1f}")


@functools.cache
def rates(device):
    """(bytes, operations) a second that a copy of 1 GiB and a product of 8192 x 8192 matrices reach."""
    x = torch.randn(8192, 8192, device=device)
    large, other = (torch.empty(2 ** 28, device=device) for _ in range(2))
    bandwidth = 2 * large.nbytes / min(seconds(lambda: other.copy_(large), device) for _ in range(10))
    return bandwidth, 2 * 8192 ** 3 / min(seconds(lambda: x @ x, device) for _ in range(10))


def counted(function):
    """(bytes moved, operations) of function()."""
    with FlopCounterMode(display=False) as operations, Bytes() as moved:
        function()
    return moved.count, operations.get_total_flops()


class Bytes(TorchDispatchMode):
    """Counts the bytes of the tensors that kernels read and write."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name, returns = op.overloadpacket.__name__, op._schema.returns
        is_view = any(value.alias_info and not value.alias_info.is_write for value in returns)
        if is_view or name.removeprefix("new_").startswith("empty"):
            return result
        read = [*args, kwargs]
        if name in READ_IN_PART:
            read[0] = result
        if name in NOT_READ:
            read[0] = None
        written = [arg for arg, about in zip(args, op._schema.arguments) if about.is_write]
        if not any(value.alias_info for value in returns):
            written.append(result)
        self.count += size_of(read) + size_of(written)
        return result


def size_of(values):
    """Bytes in memory of the tensors among nested values; one that is expanded counts once."""
    tensors = [value for value in tree_leaves(values) if torch.is_tensor(value)]
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
