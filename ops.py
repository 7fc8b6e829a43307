"""The compiled ops of csrc/: found or built, chosen once, said once. common.py uses them when this file is beside it.

load() takes a prebuilt extension (python setup.py build_ext --inplace, or pip install --no-build-isolation .), else
builds csrc/ on first use into torch's cache, else leaves everything to plain PyTorch. The environment variable
LOTTERY_OPS=compiled|fallback forces one or the other. Importing does nothing.

Every op has one PyTorch function that is its reference, its fallback and its documentation: masked_sgd_ and combine in
common.py, the others here. Their names: <op>_reference.
"""
import contextlib
import copy
import functools
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from sparse import SparseNetwork, first_sparse_part, parts, supports, update_running_statistics

NAME = "lottery_csrc"
CSRC = Path(__file__).resolve().parent / "csrc"
CUDA_ARCHITECTURES = "7.5;8.0;9.0+PTX"
# -fno-trapping-math lets comparisons into vector loops; -Wpsabi warns of vectors passed in calls, which are inlined.
THREADS = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is a plain loop without
CPU_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *THREADS]
CUDA_FLAGS = ["-O3"]
CHUNK = 64  # images that a CPU evaluates at a time, so that their activations stay near
GROUP = 4  # points of weight space that are evaluated side by side,
SHARING_GROUP = 12  # when they share the convolution of their first layer

#############################################
#             Finding, building             #
#############################################


@functools.cache
def load():
    """Choose between the compiled ops (True) and plain PyTorch (False), and say which on stderr, once.

    Raises UserError when LOTTERY_OPS=compiled and they cannot be had.
    """
    wanted = os.environ.get("LOTTERY_OPS", "")
    if wanted not in ("", "compiled", "fallback"):
        raise common.UserError(f"LOTTERY_OPS={wanted}: compiled or fallback")
    try:
        if wanted == "fallback":
            raise RuntimeError("LOTTERY_OPS=fallback")
        library = prebuilt() or build()
        torch.ops.load_library(library)
        register()
    except Exception as error:  # no compiler, a failing one, an extension of another torch: all mean the fallback
        if wanted == "compiled":
            raise common.UserError(f"LOTTERY_OPS=compiled, but no extension: {reason_of(error)}") from error
        print(f"csrc: not compiled, PyTorch fallback: {reason_of(error)}", file=sys.stderr)
        return False
    old = ", older than csrc/: python setup.py build_ext --inplace" if outdated(library) else ""
    print(f"csrc: {'cuda+cpu' if runs_on('cuda') else 'cpu'}{old}", file=sys.stderr)
    return True


def reason_of(error):
    """The one line of an exception's message that tells most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line or "not found" in line), lines[0])[:200]


@torch.compiler.assume_constant_result
def runs_on(device_type):
    """Whether the loaded extension has kernels for "cpu" or "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("lottery::masked_sgd_", device_type.upper())


def prebuilt():
    """Path of the extension that setup.py built, here or installed, or None."""
    spec = importlib.util.find_spec(NAME)
    return spec and spec.origin


def outdated(library):
    """Whether csrc/ holds a source newer than `library`."""
    return any(file.stat().st_mtime > os.path.getmtime(library) for file in CSRC.rglob("*.*") if file.suffix != ".md")


def sources(cuda):
    files = [CSRC / "bindings.cpp", *(CSRC / "cpu").glob("*.cpp"), *((CSRC / "cuda").glob("*.cu") if cuda else ())]
    return [os.path.relpath(file, CSRC.parent) for file in sorted(files)]


def build():
    """Build csrc/ into torch's cache of extensions and return the library's path. RuntimeError when that fails."""
    if not CSRC.is_dir():
        raise RuntimeError("no csrc/ beside ops.py, and no extension installed")
    set_cuda_home()
    with quietly():
        from torch.utils import cpp_extension  # reads CUDA_HOME when imported

    cuda = torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = cache / f"{NAME}-{torch.__version__}{'' if cuda else '-cpu'}"
    library = folder / f"{NAME}.so"
    with one_build_at_a_time(folder), quietly():
        if not library.exists() or outdated(library):
            print(f"csrc: building in {folder}, once, about {'5 min' if cuda else '1 min'}", file=sys.stderr)
            cpp_extension.load(NAME, [str(CSRC.parent / file) for file in sources(cuda)], extra_cflags=CPU_FLAGS,
                               extra_ldflags=THREADS, extra_cuda_cflags=CUDA_FLAGS, build_directory=str(folder),
                               is_python_module=False)
    return library


@contextlib.contextmanager
def one_build_at_a_time(folder):
    """Wait for other processes building in `folder`. A lock of torch's that a killed one left behind is removed."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system, however the process ends
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def quietly():
    """Keep torch's advice on compilers to itself; what fails is raised."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def set_cuda_home():
    """Set CUDA_HOME to the toolkit of the nvcc on the PATH, which may be a wrapper in a folder of its own."""
    nvcc = shutil.which("nvcc")
    if nvcc and not os.environ.get("CUDA_HOME"):
        steps = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = next((line.split("=", 1)[1] for line in steps.splitlines() if line.startswith("#$ TOP=")), None)
        if top:
            os.environ["CUDA_HOME"] = os.path.realpath(top)


#############################################
#       Ops beside their references         #
#############################################


def masked_sgd_(params, grads, momenta, masks, lr, momentum=0., weight_decay=0., dampening=0., nesterov=False):
    """common.masked_sgd_ in one pass and one launch; parameters also bfloat16 or float16, momenta float32."""
    if not runs_on(params[0].device.type):
        return common.masked_sgd_(params, grads, momenta, masks, lr, momentum, weight_decay, dampening, nesterov)
    torch.ops.lottery.masked_sgd_(params, grads, momenta, masks, lr, momentum, dampening, weight_decay, nesterov)


def combine_reference(states, coefficients, keep=None):
    """Points [K, P] of weight space: coefficients [K, M] over states [M, P] (float32), 0 where keep [P] is False.

    Op: combine_(points, states, coefficients, keep), in place.
    """
    points = coefficients @ states
    return points if keep is None else points.where(keep, points.new_zeros(()))


def cross_entropy_top1_reference(logits, labels):
    """Sums [K, 3] (float64) over B images of each network's loss, squared loss and correct top-1 classes.

    logits [K, B, C], labels [B]; of equal logits the first is the top one. Op: cross_entropy_top1(logits, labels).
    """
    losses = F.cross_entropy(logits.float().movedim(2, 1), labels.expand(len(logits), -1), reduction="none").double()
    return torch.stack([losses.sum(1), losses.square().sum(1), (logits.argmax(2) == labels).sum(1).double()], 1)


def norm_relu_pool_reference(x, weight, bias, eps=1e-5):
    """Instance norm with affine, ReLU and 2x2 average pooling: x [N, C, H, W] -> [N, C, H // 2, W // 2].

    Op: norm_relu_pool(x, weight, bias, eps) -> (pooled, mean [N, C], 1 / standard deviation [N, C]), of which pooled
    has a gradient (norm_relu_pool_backward). weight and bias are float32 for x in bfloat16 or float16.
    """
    normal = F.instance_norm(x.to(weight.dtype), weight=weight, bias=bias, eps=eps)
    return F.avg_pool2d(F.relu(normal), 2).to(x.dtype)


def conv_norm_relu_pool_reference(x, kernel, weight, bias, padding, eps=1e-5):
    """norm_relu_pool of a stride-1 convolution: x [N, I, H, W], kernel [C, I, h, w]. Made for few input channels.

    Op: conv_norm_relu_pool(x, kernel, weight, bias, padding, eps), returning what norm_relu_pool does; a gradient
    reaches kernel, weight and bias, not x.
    """
    return norm_relu_pool_reference(F.conv2d(x, kernel, padding=padding), weight, bias, eps)


def conv_norm_relu_pool_points_reference(x, kernels, coefficients, weight, bias, padding, eps=1e-5):
    """conv_norm_relu_pool at K points between M networks: kernels [M, C, I, h, w], coefficients [K, M], weight and bias
    [K, C]; returns [K, N, C, H // 2, W // 2].

    Op: conv_norm_relu_pool_points(x, kernels, coefficients, weight, bias, padding, eps), without gradient, M 2 or 3, C
    a multiple of 16, float32 on a CPU. A convolution is linear in its kernel: M of them serve any number of points.
    """
    points = torch.einsum("km,mcihw->kcihw", coefficients, kernels)
    return torch.stack([conv_norm_relu_pool_reference(x, *point, padding, eps) for point in zip(points, weight, bias)])


def conv3x3_reference(x, kernel):
    """Convolution with stride 1 and padding 1, x [N, I, H, W], kernel [O, I, 3, 3], I and O multiples of 16, float32.

    Op: conv3x3(x, kernel), by Winograd's algorithm: a quarter of the multiplications, about ten times the rounding.
    Without gradients it also takes conv3x3_kernel(kernel), the kernel made ready once for several calls.
    """
    return F.conv2d(x, kernel, padding=1)


def conv3x3_norm_relu_pool_reference(x, kernel, weight, bias, eps=1e-5):
    """norm_relu_pool of conv3x3, planes of at most 18 tiles of 4 x 4.

    Op: conv3x3_norm_relu_pool(x, conv3x3_kernel(kernel), weight, bias, eps), without gradient.
    """
    return norm_relu_pool_reference(conv3x3_reference(x, kernel), weight, bias, eps)


def batch_norm_relu_reference(x, weight, bias, residual=None, relu=True, eps=1e-5):
    """relu(batch_norm(x) + residual) with the statistics of the batch, x [N, C, H, W]; without the ReLU if not `relu`.

    Op: batch_norm_relu(x, weight, bias, residual, relu, eps) -> (result, mean [C], biased variance [C]), of which the
    result has a gradient (batch_norm_relu_backward). float32 on a CPU.
    """
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def bias_relu_reference(x, bias, shortcut=None):
    """relu(x + bias[channel] + shortcut), x and shortcut [N, C, H, W]. Op: bias_relu_(x, bias, shortcut), in place."""
    return F.relu(x + bias[:, None, None] + (0 if shortcut is None else shortcut))


def register():
    """Tell autograd the gradients, and torch.compile the shapes, of the ops that return tensors."""
    ops = torch.ops.lottery

    @torch.library.register_fake("lottery::cross_entropy_top1")
    def _(logits, labels):
        return logits.new_empty(len(logits), 3, dtype=torch.float64)

    def pooled_like(x, weight, height, width):
        shape = (len(x), len(weight), height // 2, width // 2)
        pooled = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
        return pooled, weight.new_empty(shape[:2]), weight.new_empty(shape[:2])

    @torch.library.register_fake("lottery::norm_relu_pool")
    def _(x, weight, bias, eps):
        return pooled_like(x, weight, *x.shape[2:])

    @torch.library.register_fake("lottery::norm_relu_pool_backward")
    def _(grad, x, weight, bias, mean, rstd):
        return torch.empty_like(x, memory_format=layout(x)), torch.empty_like(weight), torch.empty_like(bias)

    @torch.library.register_fake("lottery::conv_norm_relu_pool")
    def _(x, kernel, weight, bias, padding, eps):
        return pooled_like(x, weight, *(x.shape[d] + 2 * padding - kernel.shape[d] + 1 for d in (2, 3)))

    @torch.library.register_fake("lottery::conv_norm_relu_pool_points")
    def _(x, kernels, coefficients, weight, bias, padding, eps):
        size = ((x.shape[d] + 2 * padding - kernels.shape[d + 1] + 1) // 2 for d in (2, 3))
        return x.new_empty(len(weight), len(x), *size, weight.shape[1]).movedim(4, 2)

    @torch.library.register_fake("lottery::conv_norm_relu_pool_backward")
    def _(grad, x, kernel, weight, bias, mean, rstd, padding):
        dkernel = torch.empty_like(kernel, memory_format=torch.contiguous_format)
        return dkernel, torch.empty_like(weight), torch.empty_like(bias)

    @torch.library.register_fake("lottery::conv3x3")
    def _(x, kernel):
        shape = (len(x), len(kernel) * (16 if kernel.ndim == 3 else 1), *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))

    @torch.library.register_fake("lottery::conv3x3_kernel")
    def _(kernel):
        return kernel.new_empty(len(kernel) // 16, 36, (kernel.shape[1] + 1) * 16)

    @torch.library.register_fake("lottery::conv3x3_norm_relu_pool")
    def _(x, kernel, weight, bias, eps):
        return pooled_like(x, weight, *x.shape[2:])[0]

    @torch.library.register_fake("lottery::conv3x3_backward")
    def _(grad, x, kernel):
        return (torch.empty_like(x, memory_format=layout(x)),
                torch.empty_like(kernel, memory_format=torch.contiguous_format))

    @torch.library.register_fake("lottery::batch_norm_relu")
    def _(x, weight, bias, residual, relu, eps):
        return torch.empty_like(x, memory_format=layout(x)), torch.empty_like(weight), torch.empty_like(weight)

    @torch.library.register_fake("lottery::batch_norm_relu_backward")
    def _(grad, x, y, weight, bias, mean, variance, relu, eps):
        dx = torch.empty_like(x, memory_format=layout(x))
        return dx, torch.empty_like(weight), torch.empty_like(weight), x.new_empty(0) if y is None else dx.clone()

    def batch_norm_save(ctx, inputs, output):
        x, weight, bias, residual, ctx.relu, ctx.eps = inputs
        y, mean, variance = output
        ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, variance)

    def batch_norm_backward(ctx, grad, *_):
        dx, dweight, dbias, dresidual = ops.batch_norm_relu_backward(grad, *ctx.saved_tensors, ctx.relu, ctx.eps)
        return dx, dweight, dbias, dresidual if ctx.saved_tensors[1] is not None else None, None, None

    def save(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    def backward(ctx, grad, *_):
        return *ops.norm_relu_pool_backward(grad, *ctx.saved_tensors), None

    def conv_save(ctx, inputs, output):
        *tensors, ctx.padding, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    def conv_backward(ctx, grad, *_):
        if ctx.needs_input_grad[0]:
            raise NotImplementedError("conv_norm_relu_pool has no gradient for its input")
        return None, *ops.conv_norm_relu_pool_backward(grad, *ctx.saved_tensors, ctx.padding), None, None

    def conv3x3_save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def conv3x3_backward(ctx, grad):
        return ops.conv3x3_backward(grad, *ctx.saved_tensors)

    torch.library.register_autograd("lottery::batch_norm_relu", batch_norm_backward, setup_context=batch_norm_save)
    torch.library.register_autograd("lottery::conv3x3", conv3x3_backward, setup_context=conv3x3_save)
    torch.library.register_autograd("lottery::norm_relu_pool", backward, setup_context=save)
    torch.library.register_autograd("lottery::conv_norm_relu_pool", conv_backward, setup_context=conv_save)


def layout(x):
    """Memory format in which the ops of norm, ReLU and pooling leave their results: channels_last on a CPU."""
    return torch.channels_last if x.device.type == "cpu" else torch.contiguous_format


#############################################
#              Fused networks               #
#############################################


class Fused(nn.Module):
    """A view of `model`: shares its parameters, buffers and train or eval mode, computes the same, faster."""

    def __init__(self, model):
        super().__init__()
        self.model, self.copies = [model], []  # in lists: not submodules
        self.plain = all(type(module) in PLAIN and not has_hooks(module) for module in model.modules())
        self.network = self.view(model)
        self.readied = [layer for layer in self.network.modules() if hasattr(layer, "ready")]

    def view(self, module):
        """`module`, or a twin of it in which the runs of layers that have a fused op are one layer."""
        if type(module) is common.BasicBlock and not any(map(has_hooks, module.modules())):
            return FoldedBlock(module)
        children = {name: self.view(child) for name, child in module.named_children()}
        if type(module).forward is nn.Sequential.forward:
            layers = fuse_layers(list(children.values()))
            children = children if len(layers) == len(children) else dict(enumerate(layers))
        if all(child is module._modules.get(name) for name, child in children.items()):
            return module
        twin = object.__new__(type(module))
        twin.__dict__ = module.__dict__ | {"_modules": {str(name): child for name, child in children.items()}}
        self.copies.append((twin, module))
        return twin

    def forward(self, x):
        if not torch.is_grad_enabled():
            self.ready()  # once for all chunks
        if not self.plain or x.device.type != "cpu" or self.model[0].training or torch.is_grad_enabled():
            return self.run(x)
        return torch.cat([self.run(chunk) for chunk in x.split(CHUNK)])

    def run(self, x):
        """The network, made ready if no gradient is wanted."""
        for twin, module in self.copies:
            twin.training = module.training
        if self.plain and x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return self.network(x)

    def ready(self):
        """Work that depends on the parameters alone, before evaluation."""
        for layer in self.readied:
            layer.ready()

    def after(self, count, x):
        """What an nn.Sequential, made ready, makes of the result of its first `count` layers."""
        for layer in list(self.network.children())[count:]:
            x = layer(x)
        return x


def path(model, mask=None, sparse="auto"):
    """ "sparse" or "dense": which way fused() takes a model with this mask, for the progress line."""
    return "dense" if dense_parts(model, mask, sparse) is None else "sparse"


def dense_parts(model, mask, sparse):
    """How many parts a sparse network begins with that are dense; None when it is all dense."""
    if not mask or sparse == "off" or not supports(model):
        return None
    count = 0 if sparse == "on" else first_sparse_part(model, mask)
    return count if count < len(parts(model)) else None


def fused(model, mask=None, sparse="auto", plans=None):
    """A cheap view of `model`, equal to it within rounding. The model itself never changes.

    With a `mask` it meets the surviving weights only (sparse.py): `sparse` "auto" from the first layer on where that
    pays, "on" everywhere, "off" nowhere. The pruned weights are 0. Views with one mask may share a dict of `plans`.

    In every nn.Sequential the run [instance norm, ReLU, AvgPool2d(2)] becomes one op, together with a convolution
    before it, whose bias the norm cancels and which therefore gets no gradient. In eval mode without gradients
    BatchNorm is folded into the convolution before it, in nn.Sequential and in common's ResNets.
    """
    count = dense_parts(model, mask, sparse)
    if count is not None:
        dense = [Fused(nn.Sequential(*map(model.get_submodule, names))) for names in parts(model)[:count]]
        return SparseNetwork(model, mask, dense, plans)
    parameter = next(model.parameters(), None)
    return Fused(model) if parameter is not None and runs_on(parameter.device.type) else model


def has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def fuse_layers(layers):
    """The layers of an nn.Sequential with fused ones in place of the runs that have an op."""
    fused = []
    while layers:
        for count, kind in ((4, ConvBlock), (3, NormBlock), (3, FoldedConv), (2, FoldedConv)):
            run = layers[:count]
            if len(run) == count and not any(map(has_hooks, run)) and kind.takes(*run):
                break
        else:
            count, run, kind = 1, layers[:1], lambda layer: layer
        fused.append(kind(*run))
        layers = layers[count:]
    return fused


def suits_winograd(conv):
    """Whether conv3x3 does what `conv` does, apart from its bias."""
    return (conv.kernel_size == (3, 3) and conv.stride == conv.dilation == conv.padding == (1, 1) and conv.groups == 1
            and conv.padding_mode == "zeros" and conv.in_channels % 16 == conv.out_channels % 16 == 0
            and conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu"))


def convolve(conv, x, weight, bias=None):
    """What `conv` does, with this weight and bias; on a CPU by Winograd's algorithm where that is faster."""
    if bias is None and suits_winograd(conv) and x.dtype == torch.float32 and min(x.shape[2:]) >= 3:
        return torch.ops.lottery.conv3x3(x, weight)
    return conv._conv_forward(x, weight, bias)


def few_tiles(x):
    """Whether conv3x3_norm_relu_pool takes images of this size."""
    height, width = x.shape[2:]
    return min(height, width) >= 3 and -(-height // 4) * -(-width // 4) <= 18


def is_instance_norm(norm):
    if type(norm) is nn.GroupNorm:
        return norm.affine and norm.num_groups == norm.num_channels
    return type(norm) is nn.InstanceNorm2d and norm.affine and not norm.track_running_stats


def is_halving(pool):
    if type(pool) is not nn.AvgPool2d or pool.ceil_mode or pool.divisor_override:
        return False
    pairs = [pool.kernel_size, pool.stride, pool.padding]
    return [value if isinstance(value, tuple) else (value, value) for value in pairs] == [(2, 2), (2, 2), (0, 0)]


class NormBlock(nn.Module):
    """[instance norm, ReLU, AvgPool2d(2)] as one op."""

    @staticmethod
    def takes(norm, relu, pool):
        return is_instance_norm(norm) and type(relu) is nn.ReLU and is_halving(pool)

    def __init__(self, norm, relu, pool):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        sums_in = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = self.norm.weight.to(sums_in), self.norm.bias.to(sums_in)
        return torch.ops.lottery.norm_relu_pool(x, weight, bias, self.norm.eps)[0]


class ConvBlock(NormBlock):
    """[Conv2d, instance norm, ReLU, AvgPool2d(2)]; on a CPU one op when the convolution reads few channels."""

    @staticmethod
    def takes(conv, *run):
        return type(conv) is nn.Conv2d and NormBlock.takes(*run)

    def __init__(self, conv, *run):
        super().__init__(*run)
        self.conv = conv
        simple = conv.groups == 1 and conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        self.few_channels = simple and conv.weight[0].numel() <= 75 and conv.padding in ((0, 0), (1, 1), (2, 2), (3, 3))
        self.kernel = None

    def ready(self):
        winograd = suits_winograd(self.conv) and self.norm.weight.dtype == torch.float32
        self.kernel = torch.ops.lottery.conv3x3_kernel(self.conv.weight) if winograd else None

    def forward(self, x):
        conv, norm = self.conv, self.norm
        same_type = x.dtype == conv.weight.dtype == norm.weight.dtype
        if self.few_channels and x.device.type == "cpu" and same_type and not x.requires_grad:
            op = torch.ops.lottery.conv_norm_relu_pool
            return op(x, conv.weight, norm.weight, norm.bias, conv.padding[0], norm.eps)[0]
        if self.kernel is not None and not torch.is_grad_enabled() and x.dtype == torch.float32 and few_tiles(x):
            return torch.ops.lottery.conv3x3_norm_relu_pool(x, self.kernel, norm.weight, norm.bias, norm.eps)
        return super().forward(convolve(conv, x, conv.weight))


def has_batch_norm_op(norm, x):
    """Whether batch_norm_relu takes x and this BatchNorm2d in training."""
    return (norm.affine and norm.track_running_stats and x.device.type == "cpu" and x.numel() > x.shape[1]
            and x.dtype == norm.weight.dtype == torch.float32)


def batch_norm_relu(norm, x, residual, relu):
    """relu(norm(x) + residual) of a BatchNorm2d in training, whose running statistics it updates."""
    y, mean, variance = torch.ops.lottery.batch_norm_relu(x, norm.weight, norm.bias, residual, relu, norm.eps)
    update_running_statistics(norm, mean, variance, x.numel() // x.shape[1])
    return y


class FoldedConv(nn.Module):
    """[Conv2d, BatchNorm2d] or [Conv2d, BatchNorm2d, ReLU]: one op behind the convolution in training, folded into it
    in eval mode when no gradient is wanted."""

    @staticmethod
    def takes(conv, norm, relu=None):
        return type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and type(relu) in (nn.ReLU, type(None))

    def __init__(self, conv, norm, relu=None):
        super().__init__()
        self.conv, self.norm, self.relu = conv, norm, relu

    def ready(self):
        """Fold the norm into the convolution's weight and bias."""
        conv, norm = self.conv, self.norm
        self.folds = not norm.training and norm.running_mean is not None
        if self.folds:
            scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
            bias = (0 if conv.bias is None else conv.bias) - norm.running_mean
            self.bias = torch.addcmul(torch.zeros_like(bias) if norm.bias is None else norm.bias, bias, scale)
            self.weight = conv.weight * scale[:, None, None, None]
            self.winograd = self.relu is not None and suits_winograd(conv)
            if self.winograd:
                self.weight = torch.ops.lottery.conv3x3_kernel(self.weight)

    def forward(self, x, shortcut=None):
        """relu(norm(conv(x)) + shortcut), or without a ReLU norm(conv(x))."""
        conv, norm = self.conv, self.norm
        if torch.is_grad_enabled() or not self.folds:
            y = convolve(conv, x, conv.weight, conv.bias)
            if norm.training and has_batch_norm_op(norm, y):
                return batch_norm_relu(norm, y, shortcut, self.relu is not None)
            y = norm(y) if shortcut is None else norm(y) + shortcut
            return y if self.relu is None else self.relu(y)
        if self.relu is None:
            return conv._conv_forward(x, self.weight, self.bias)
        y = torch.ops.lottery.conv3x3(x, self.weight) if self.winograd else conv._conv_forward(x, self.weight, None)
        torch.ops.lottery.bias_relu_(y, self.bias.to(y.dtype), shortcut)
        return y


class FoldedBlock(nn.Module):
    """common.BasicBlock with its BatchNorms folded."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.folds = isinstance(block.norm1, nn.BatchNorm2d)
        if self.folds:
            self.conv1 = FoldedConv(block.conv1, block.norm1, block.relu1)
            self.conv2 = FoldedConv(block.conv2, block.norm2, block.relu2)
            self.shortcut = FoldedConv(*block.shortcut) if len(block.shortcut) else nn.Identity()

    def forward(self, x):
        return self.conv2(self.conv1(x), self.shortcut(x)) if self.folds else self.block(x)


# What a network of these does, without hooks, is known: it may run in channels_last, and on chunks of a batch.
PLAIN = {nn.Sequential, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.ReLU, nn.AvgPool2d,
         nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout,
         common.ConvNet3, common.BasicBlock, common.ResNet}

#############################################
#       Many points of weight space         #
#############################################


def can_batch(model):
    """Whether evaluate_points takes this network: known layers, float32, on a device with kernels."""
    network = fused(model)
    return isinstance(network, Fused) and network.plain and all(p.dtype == torch.float32 for p in model.parameters())


def evaluate_points(model, states, coefficients, splits, mask=None, progress=None, sparse="auto"):
    """common.evaluate_points for networks that can_batch takes: a few points at a time, on the same images.

    A point's scores do not depend, to the last bit, on the points it is evaluated with.
    """
    flat, views = flatten(states)
    keep = torch.ones_like(flat[0], dtype=torch.bool) if mask else None
    for name, kept in (mask or {}).items():
        views(keep)[name].copy_(kept)
    first = first_layer_of_points(model, [views(row) for row in flat], mask)
    size = min(SHARING_GROUP if first else GROUP, len(coefficients))
    points, plans = flat.new_empty(size, flat.shape[1]), {}
    views_of_points = [views(point) for point in points]
    networks = [fused(bound(model, point), mask, sparse, plans) for point in views_of_points]
    scores = []
    for group in torch.tensor(coefficients, dtype=torch.float32, device=flat.device).split(size):
        torch.ops.lottery.combine_(points[:len(group)], flat, group, keep)
        shared = first and functools.partial(first, group, views_of_points[:len(group)])
        sums = [sum_of_scores(networks[:len(group)], split, shared).tolist() for split in splits]
        scores += [[common.score(*point, len(split)) for point, split in zip(row, splits)] for row in zip(*sums)]
        for _ in group if progress else ():
            progress()
    model.load_state_dict(common.combine(states, coefficients[-1], mask))
    return scores


def first_layer_of_points(model, states, mask=None):
    """A function (coefficients [K, M], K states between the M `states`, images) -> the results [K, N, C, H, W] of the
    first layer of `model` at the K points, masked; None when the op does not take that layer."""
    network = fused(model).network
    layer = next(network.children(), None)
    if not (isinstance(network, nn.Sequential) and isinstance(layer, ConvBlock) and layer.few_channels
            and layer.conv.weight.device.type == "cpu" and layer.conv.out_channels % 16 == 0 and len(states) in (2, 3)):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kernel, weight, bias = (names[id(p)] for p in (layer.conv.weight, layer.norm.weight, layer.norm.bias))
    kernels = torch.stack([state[kernel] for state in states])
    if mask:
        kernels *= mask[kernel]

    def first(coefficients, points, images):
        affine = (torch.stack([point[name] for point in points]) for name in (weight, bias))
        return torch.ops.lottery.conv_norm_relu_pool_points(
            images, kernels, coefficients, *affine, layer.conv.padding[0], layer.norm.eps)

    return first


@torch.no_grad()
def sum_of_scores(networks, split, first=None):
    """Sums [K, 3] over `split` of the networks' loss, squared loss and correct answers; they share the images.

    `first` gives the results of all networks' first layers at once.
    """
    sums = torch.zeros(len(networks), 3, dtype=torch.float64, device=split.labels.device)
    batch_size = CHUNK if first else 500
    for network in networks if first else ():
        network.ready()
    for start in range(0, len(split), batch_size):
        images, labels = split.batch(slice(start, start + batch_size))
        if first:
            logits = [network.after(1, x) for network, x in zip(networks, first(images))]
        else:
            logits = [network(images) for network in networks]
        sums += torch.ops.lottery.cross_entropy_top1(torch.stack(logits), labels)
    return sums


def flatten(states):
    """(their floating-point values as rows [M, P], a function that gives a row's views by name).

    Convolution weights lie there as channels_last, the order in which the convolutions read them.
    """
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    rows = torch.stack([torch.cat([channels_innermost(state[name]).flatten() for name in names]) for state in states])
    shapes = [channels_innermost(states[0][name]).shape for name in names]

    def views(row):
        parts = row.split([shape.numel() for shape in shapes])
        return {name: part.view(shape).movedim(-1, 1) if len(shape) == 4 else part.view(shape)
                for name, part, shape in zip(names, parts, shapes)}

    return rows, views


def channels_innermost(value):
    return value.movedim(1, -1) if value.ndim == 4 else value


def bound(model, views):
    """A copy of `model` in eval mode whose parameters and buffers are `views`."""
    network = copy.deepcopy(model).eval()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name in views:
            tensor.data = views[name]
    return network
