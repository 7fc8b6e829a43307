"""Every compiled op against its PyTorch reference in float64, torch's own optimizer, and cases worked out by hand.

On a machine with a GPU and the CUDA half built the same tests run there too: pytest -m cuda.
"""
import contextlib
import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.data import Split
from common.evaluation import combine, evaluate_points
from common.kernels import build, ops, points, views
from common.kernels.views import view
from common.networks import build_network, prunable
from common.streams import random_stream
from common.training import Recipe, train

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])]
LOWER = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.skipif(not ops.load(), reason="needs the extension")


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    return torch.device(request.param)


def close(actual, wanted, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def opcheck(name, *arguments, **options):
    torch.library.opcheck(getattr(torch.ops.lottery, name).default, arguments, **options)


#############################################
#                masked_sgd_                #
#############################################


def sgd_problem(device, dtype=torch.float32):
    """Parameters of awkward sizes and layouts, gradients, momenta and masks, some None."""
    shapes = [(3, 5, 3, 3), (7,), (), (0, 4), (130, 70), (16, 8, 3, 3)]
    params = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    params[4] = torch.randn(70, 130, device=device).to(dtype).t()  # dense in another order
    params[5] = params[5].to(memory_format=torch.channels_last)
    params.append(torch.randn(100, device=device).to(dtype)[1:])  # not on a 16-byte boundary
    params.append(torch.randn(50, 2, device=device).to(dtype)[:, 0])  # with gaps
    grads = [torch.randn(p.shape, device=device).to(dtype) for p in params]
    momenta = [torch.randn(p.shape, device=device) for p in params]
    masks = [torch.rand(p.shape, device=device) < .5 if i % 3 != 1 else None for i, p in enumerate(params)]
    return params, grads, momenta, masks


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("dampening, nesterov", [(0., False), (.2, False), (0., True)])
def test_masked_sgd_is_the_reference(device, dtype, dampening, nesterov):
    params, grads, momenta, masks = sgd_problem(device, dtype)
    wanted = [[t.double() for t in tensors] for tensors in (params, grads, momenta)]
    ops.masked_sgd_reference(*wanted, masks, .1, .9, .01, dampening, nesterov)
    ops.masked_sgd_(params, grads, momenta, masks, .1, .9, .01, dampening, nesterov)
    for p, m, wanted_p, wanted_m, mask in zip(params, momenta, wanted[0], wanted[2], masks):
        close(p, wanted_p, TOLERANCE[dtype])
        close(m, wanted_m, TOLERANCE[dtype])
        if mask is not None:
            assert not p[~mask].any() and not m[~mask].any()


@pytest.mark.parametrize("options", [dict(momentum=.9), dict(momentum=.9, nesterov=True, weight_decay=.01),
                                     dict(weight_decay=.1), dict(momentum=.5, dampening=.3)])
def test_fifty_steps_follow_torch(device, options):
    weight = torch.randn(20, 30, device=device)
    target, mask = torch.randn(20, 30, device=device), torch.rand(20, 30, device=device) < .4
    theirs = nn.Parameter((weight * mask).double())
    optimizer = torch.optim.SGD([theirs], lr=.05, **options)
    ours, momentum = weight * mask, torch.zeros_like(weight)
    for step in range(50):
        optimizer.zero_grad()
        (theirs - target).square().sum().backward()
        theirs.grad *= mask
        optimizer.step()
        settings = options | {"dampening": options.get("dampening", 0.) if step else 0.}
        ops.masked_sgd_([ours], [2 * (ours - target)], [momentum], [mask], .05, **settings)
    close(ours, theirs, 1e-4)
    assert not ours[~mask].any() and not momentum[~mask].any()


def test_masked_sgd_by_hand(device):
    p, m = torch.tensor([1., 2., 3.], device=device), torch.tensor([1., 1., 1.], device=device)
    g, mask = torch.tensor([1., float("nan"), 0.], device=device), torch.tensor([True, False, True], device=device)
    ops.masked_sgd_([p], [g], [m], [mask], .5, .5, 1.)
    assert p.tolist() == [-.25, 0., 1.25] and m.tolist() == [2.5, 0., 3.5]  # even from a gradient that is not a number


def test_masked_sgd_takes_more_tensors_than_a_launch(device):
    params = [torch.ones(3, device=device) for _ in range(200)]
    momenta = [torch.zeros(3, device=device) for _ in params]
    ops.masked_sgd_(params, [torch.ones_like(p) for p in params], momenta, [None] * 200, .25)
    assert all(p.tolist() == [.75] * 3 for p in params)


def test_masked_sgd_refuses(device):
    def refused(params, grads, momenta, masks):
        with pytest.raises(RuntimeError) as error:
            ops.masked_sgd_(params, grads, momenta, masks, .1)
        return str(error.value)

    p = torch.ones(3, device=device)
    assert "Double" in refused([p.double()], [p.double()], [p], [None])
    assert "Half" in refused([p], [p.half()], [p], [None])
    assert "[2]" in refused([p], [p[:2]], [p], [None])
    assert "Float" in refused([p], [p], [p], [p])
    assert "1 params, 0 grads" in refused([p], [], [p], [None])


def test_masked_sgd_schema(device):
    params, grads, momenta, masks = sgd_problem(device)
    lr = torch.tensor(.1, device=device)
    opcheck("masked_sgd_", params[:2], grads[:2], momenta[:2], masks[:2], lr, .9, 0., .01, False)


def test_dsa_is_the_reference(device):
    images, colour = torch.randn(5, 3, 9, 12, device=device), torch.rand(5, 3, device=device)
    identity = torch.tensor([1., 0., 0., 0., 1., 0.], device=device)
    transform = identity + torch.rand(5, 6, device=device) - .5
    close(torch.ops.lottery.dsa(images, colour, transform), ops.dsa_reference(images, colour, transform), 1e-4)
    opcheck("dsa", images, colour, transform)


#############################################
#      combine_ and cross_entropy_top1      #
#############################################


@pytest.mark.parametrize("count, total, size", [(2, 11, 1000), (3, 5, 777), (4, 1, 64), (7, 70, 33), (2, 0, 5),
                                                (2, 3, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_combine(device, count, total, size, masked):
    states, coefficients = torch.randn(count, size, device=device), torch.randn(total, count, device=device)
    keep = torch.rand(size, device=device) < .5 if masked else None
    points = torch.full((total, size), torch.nan, device=device)
    torch.ops.lottery.combine_(points, states, coefficients, keep)
    close(points, ops.combine_reference(states.double(), coefficients.double(), keep))


def test_combine_at_an_end_is_that_state(device):
    states = torch.randn(2, 100, device=device)
    points = torch.empty(2, 100, device=device)
    torch.ops.lottery.combine_(points, states, torch.eye(2, device=device), None)
    assert torch.equal(points, states)


def test_combine_refuses(device):
    points, states, coefficients = (torch.zeros(shape, device=device) for shape in ((3, 5), (2, 5), (3, 2)))
    for wrong, message in [((points, states, coefficients[:, :1], None), r"\[3, 1\]"),
                           ((points, states.double(), coefficients, None), "Double"),
                           ((points, states, coefficients, torch.ones(4, device=device).bool()), r"\[4\]")]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lottery.combine_(*wrong)
    opcheck("combine_", points, states, coefficients, torch.ones(5, device=device).bool())


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("networks, images, classes", [(1, 1, 1), (3, 50, 10), (2, 37, 100), (2, 0, 5), (0, 4, 5)])
def test_cross_entropy_top1(device, dtype, networks, images, classes):
    logits = (5 * torch.randn(networks, images, classes, device=device)).to(dtype)
    labels = torch.randint(classes, (images,), device=device)
    sums = torch.ops.lottery.cross_entropy_top1(logits, labels)
    assert sums.dtype == torch.float64
    close(sums, ops.cross_entropy_top1_reference(logits, labels), 1e-5)


def test_cross_entropy_top1_by_hand(device):
    labels = torch.tensor([0, 1, 1], device=device)
    logits = torch.tensor([[[1000., 1000.], [1000., 1000.], [0., -1000.]]], device=device)  # ties, and no overflow
    sums = torch.ops.lottery.cross_entropy_top1(logits, labels)[0].tolist()
    ln2 = 0.6931471805599453
    assert sums == pytest.approx([2 * ln2 + 1000, 2 * ln2 ** 2 + 1e6, 1], rel=1e-6)


def test_cross_entropy_top1_takes_any_strides_and_nan(device):
    logits = torch.randn(10, 4, 6, device=device).permute(1, 2, 0)  # [4, 6, 10]
    labels = torch.randint(10, (12,), device=device)[::2]
    logits[0, 0, 7] = torch.nan
    sums = torch.ops.lottery.cross_entropy_top1(logits, labels)
    wanted = ops.cross_entropy_top1_reference(logits, labels)
    close(sums[1:], wanted[1:])
    assert sums[0, 0].isnan() and sums[0, 2] == wanted[0, 2]


def test_cross_entropy_top1_refuses():
    logits = torch.zeros(2, 3, 4)
    for arguments, message in [((logits, torch.tensor([0, 1, 4])), "label 4 at 2"),
                               ((logits, torch.zeros(2).long()), r"\[2\]"), ((logits, torch.zeros(3)), "Float"),
                               ((logits.double(), torch.zeros(3).long()), "Double")]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lottery.cross_entropy_top1(*arguments)
    opcheck("cross_entropy_top1", logits, torch.zeros(3).long())


#############################################
#        Norm, ReLU, pooling, bias          #
#############################################


def affine(channels, device, dtype):
    return (torch.randn(channels, device=device, dtype=dtype) for _ in range(2))


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, *LOWER])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 21, 5, 7), (1, 40, 32, 16), (2, 3, 2, 2)])
def test_norm_relu_pool_and_gradient(device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    weight, bias = affine(shape[1], device, accumulation(dtype))
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [x.contiguous(memory_format=layout).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        pooled = torch.ops.lottery.norm_relu_pool(*inputs, 1e-5)[0]
        wanted = ops.norm_relu_pool_reference(*exact)
        close(pooled, wanted, TOLERANCE[dtype])
        grad = torch.randn_like(pooled)
        grads = torch.autograd.grad(pooled, inputs, grad), torch.autograd.grad(wanted, exact, grad.double())
        for one, other in zip(*grads):
            close(one, other, 4 * TOLERANCE[dtype])


@pytest.mark.cuda
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.float64, *LOWER])
@pytest.mark.parametrize("channels", [16, 5])
def test_norm_relu_pool_of_points_side_by_side(dtype, channels):
    x = torch.randn(6, 3 * channels, 9, 8, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(3, channels, device="cuda", dtype=accumulation(dtype)) for _ in range(2))
    pooled = torch.ops.lottery.norm_relu_pool_points(x, weight, bias, 1e-5)
    wanted = ops.norm_relu_pool_points_reference(x.double(), weight.double(), bias.double())
    assert all(point.is_contiguous(memory_format=torch.channels_last) for point in pooled)
    close(pooled, wanted, TOLERANCE[dtype])


def test_norm_relu_pool_of_no_images(device):
    x, (weight, bias) = torch.randn(0, 4, 6, 6, device=device, requires_grad=True), affine(4, device, torch.float32)
    pooled = torch.ops.lottery.norm_relu_pool(x, weight.requires_grad_(), bias, 1e-5)[0]
    assert pooled.shape == (0, 4, 3, 3)
    assert torch.autograd.grad(pooled.sum(), weight)[0].tolist() == [0.] * 4


@pytest.mark.parametrize("channels_in, channels, size, kernel, padding",
                         [(3, 32, 16, 3, 1), (1, 20, 12, 3, 3), (2, 16, 3, 2, 0), (3, 8, 9, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conv_norm_relu_pool_and_gradient(device, dtype, channels_in, channels, size, kernel, padding):
    x = torch.randn(5, channels_in, size, size + 2, device=device, dtype=dtype)
    kernels = torch.randn(channels, channels_in, kernel, kernel, device=device, dtype=dtype)
    inputs = [t.requires_grad_() for t in (kernels, *affine(channels, device, dtype))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    pooled = torch.ops.lottery.conv_norm_relu_pool(x, *inputs, padding, 1e-5)[0]
    wanted = ops.conv_norm_relu_pool_reference(x.double(), *exact, padding)
    close(pooled, wanted, TOLERANCE[dtype])
    grad = torch.randn_like(pooled)
    for one, other in zip(torch.autograd.grad(pooled, inputs, grad), torch.autograd.grad(wanted, exact, grad.double())):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=10 * TOLERANCE[dtype] * float(other.abs().max()))


@pytest.mark.parametrize("networks, points, channels_in, size, kernel, padding",
                         [(2, 11, 3, 16, 3, 1), (3, 1, 1, 9, 3, 3), (3, 4, 2, 3, 2, 0)])
def test_conv_norm_relu_pool_points(networks, points, channels_in, size, kernel, padding):
    x, kernels = torch.randn(5, channels_in, size, size + 2), torch.randn(networks, 32, channels_in, kernel, kernel)
    tensors = x, kernels, torch.randn(points, networks), torch.rand(points, 32) + .5, torch.randn(points, 32)
    wanted = ops.conv_norm_relu_pool_points_reference(*(t.double() for t in tensors), padding)
    close(torch.ops.lottery.conv_norm_relu_pool_points(*tensors, padding, 1e-5), wanted, TOLERANCE[torch.float32])
    opcheck("conv_norm_relu_pool_points", *tensors, padding, 1e-5)


def test_conv_norm_relu_pool_points_refuses():
    x, kernels, coefficients, weight = (torch.randn(s) for s in ((1, 3, 8, 8), (2, 16, 3, 3, 3), (4, 2), (4, 16)))
    op = torch.ops.lottery.conv_norm_relu_pool_points
    for arguments, message in [((x, kernels[:1], coefficients, weight, weight), r"\[1, 16, 3, 3, 3\]"),
                               ((x, kernels[:, :8], coefficients, weight, weight), r"\[2, 8, 3, 3, 3\]"),
                               ((x, kernels, coefficients[:3], weight, weight), r"\[3, 2\]"),
                               ((x, kernels, coefficients.double(), weight, weight), "Double")]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 1, 1e-5)


@pytest.mark.parametrize("images, channels_in, channels, height, width",
                         [(2, 16, 32, 8, 8), (3, 32, 16, 5, 11), (1, 16, 16, 1, 3), (30, 16, 16, 4, 4),
                          (0, 16, 16, 4, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv3x3_and_gradient(device, images, channels_in, channels, height, width, layout):
    x = torch.randn(images, channels_in, height, width, device=device).contiguous(memory_format=layout).requires_grad_()
    kernel = torch.randn(channels, channels_in, 3, 3, device=device, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, kernel)]
    y, wanted = torch.ops.lottery.conv3x3(x, kernel), ops.conv3x3_reference(*exact)
    close(y, wanted, 1e-4)
    grad = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, (x, kernel), grad), torch.autograd.grad(wanted, exact, grad.double())):
        close(one, other, 2e-4)


@pytest.mark.parametrize("images, channels_in, channels, height, width",
                         [(5, 16, 48, 8, 8), (3, 32, 16, 7, 13), (4, 16, 32, 16, 16)])
def test_conv3x3_norm_relu_pool(images, channels_in, channels, height, width):
    x, kernel = torch.randn(images, channels_in, height, width), torch.randn(channels, channels_in, 3, 3)
    arguments = x, torch.ops.lottery.conv3x3_kernel(kernel), *affine(channels, "cpu", torch.float32), 1e-5
    wanted = ops.conv3x3_norm_relu_pool_reference(x.double(), kernel.double(), *(t.double() for t in arguments[2:4]))
    close(torch.ops.lottery.conv3x3_norm_relu_pool(*arguments), wanted, 1e-4)
    assert torch.equal(torch.ops.lottery.conv3x3(x, arguments[1]), torch.ops.lottery.conv3x3(x, kernel))
    assert len(torch.ops.lottery.conv3x3_norm_relu_pool(x[:0], *arguments[1:])) == 0
    opcheck("conv3x3_norm_relu_pool", *arguments)
    opcheck("conv3x3_kernel", kernel)


def test_conv3x3_by_hand(device):
    kernel = torch.zeros(16, 16, 3, 3, device=device)
    kernel[:, 0, 0, 2] = 1  # output [y, x] = input [y - 1, x + 1] of channel 0
    x = torch.randn(1, 16, 7, 6, device=device)
    y = torch.ops.lottery.conv3x3(x, kernel)
    close(y[0, 5, 1:, :-1], x[0, 0, :-1, 1:], 1e-5)
    assert y[0, 5, 0].abs().max() < 1e-5 and y[0, 5, :, -1].abs().max() < 1e-5


def test_conv3x3_refuses(device):
    x = torch.randn(1, 16, 4, 4, device=device)
    for kernel, message in [(torch.randn(8, 16, 3, 3), "8, 16, 3, 3"), (torch.randn(16, 16, 5, 5), "5, 5"),
                            (torch.randn(16, 16, 3, 3).double(), "Double")]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lottery.conv3x3(x, kernel.to(device))
    opcheck("conv3x3", x.requires_grad_(), torch.randn(16, 16, 3, 3, device=device, requires_grad=True))


def test_gradients_by_finite_differences(device):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, device=device, requires_grad=True)
    weight, bias = (t.requires_grad_() for t in affine(3, device, torch.float64))
    assert torch.autograd.gradcheck(lambda *args: torch.ops.lottery.norm_relu_pool(*args, 1e-5)[0], (x, weight, bias))
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    images = torch.randn(2, 2, 6, 6, dtype=torch.float64, device=device)
    op = torch.ops.lottery.conv_norm_relu_pool
    assert torch.autograd.gradcheck(lambda *args: op(images, *args, 1, 1e-5)[0], (kernel, weight, bias))


def test_norm_ops_pass_opcheck(device):
    x, (weight, bias) = torch.randn(2, 5, 6, 6, device=device), affine(5, device, torch.float32)
    opcheck("norm_relu_pool", x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 1e-5)
    kernel = torch.randn(5, 3, 3, 3, device=device, requires_grad=True)
    opcheck("conv_norm_relu_pool", torch.randn(2, 3, 6, 6, device=device), kernel, weight, bias, 1, 1e-5)
    opcheck("bias_relu_", torch.randn(2, 5, 3, 3, device=device), bias.detach(), torch.randn(2, 5, 3, 3, device=device))


def test_norm_ops_refuse(device):
    x, (weight, bias) = torch.randn(2, 5, 6, 6, device=device), affine(5, device, torch.float32)
    op = torch.ops.lottery.norm_relu_pool
    for arguments, message in [((x[0], weight, bias), r"\[5, 6, 6\]"), ((x[..., :1], weight, bias), r"\[2, 5, 6, 1\]"),
                               ((x, weight[:4], bias), r"\[4\]"), ((x, weight.double(), bias), "Double"),
                               ((x.int(), weight, bias), "Int")]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 1e-5)
    with pytest.raises(RuntimeError, match="1 x 6"):
        kernel = torch.randn(5, 5, 3, 1, device=device)
        torch.ops.lottery.conv_norm_relu_pool(x[:, :, :3], kernel, weight, bias, 0, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, *LOWER])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (3, 5, 3, 7), (0, 4, 2, 2)])
def test_bias_relu(device, dtype, layout, shape):
    x, shortcut = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    bias = torch.randn(shape[1], device=device).to(dtype)
    for added in (None, shortcut):
        wanted = ops.bias_relu_reference(x.double(), bias.double(), added)
        y = x.clone()
        torch.ops.lottery.bias_relu_(y, bias, added)
        close(y, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (64, 32, 16, 16), (2, 7000, 1, 2)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_batch_norm_relu_and_gradient(shape, relu, added):
    x, residual = 3 + torch.randn(shape), torch.randn(shape).contiguous(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, *affine(shape[1], "cpu", torch.float32), residual)[:4 if added else 3]]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    op = torch.ops.lottery.batch_norm_relu
    y, mean, variance = op(*inputs, *([] if added else [None]), relu, 1e-5)
    wanted = ops.batch_norm_relu_reference(*exact, relu=relu)
    close(y, wanted)
    close(mean, exact[0].mean((0, 2, 3)))
    close(variance, exact[0].var((0, 2, 3), unbiased=False))
    grad = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(wanted, exact, grad.double())):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_batch_norm_relu_does_not_depend_on_threads():
    x, (weight, bias), threads = torch.randn(16, 32, 16, 16), affine(32, "cpu", torch.float32), torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(torch.ops.lottery.batch_norm_relu(x, weight, bias, x, True, 1e-5))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_batch_norm_relu_passes_opcheck_and_refuses():
    x, (weight, bias) = torch.randn(2, 5, 4, 4), affine(5, "cpu", torch.float32)
    leaves = [t.requires_grad_() for t in (x.clone(), weight.clone(), bias.clone())]
    opcheck("batch_norm_relu", *leaves, x.clone().requires_grad_(), True, 1e-5)
    opcheck("batch_norm_relu", *leaves, None, False, 1e-5)
    for arguments, message in [((x.double(), weight.double(), bias.double(), None), "Double"),
                               ((x, weight[:4], bias, None), r"\[4\]"),
                               ((x[:0], weight, bias, None), r"\[0, 5, 4, 4\]"),
                               ((x, weight, bias, x[:1]), r"\[1, 5, 4, 4\]")]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lottery.batch_norm_relu(*arguments, True, 1e-5)


#############################################
#         Fused networks and points         #
#############################################


def small_network(model, norm, width=8, device="cpu"):
    config = dict(model=model, norm=norm, channels=3, image_size=16, num_classes=4, width=width)
    network = build_network(config).to(device)
    for module in network.modules():  # statistics and affine values that would show a mix-up
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, .5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=.3)
            nn.init.uniform_(module.running_var, .5, 2)
    return network


NETWORKS = [("convnet3", "instance"), ("convnet3", "batch"), ("convnet3", "none"), ("resnet10", "batch"),
            ("resnet10", "instance")]


@pytest.mark.parametrize("model, norm", NETWORKS)
def test_fused_network_is_the_network(device, model, norm):
    network = small_network(model, norm, device=device)
    before = copy.deepcopy(network.state_dict())
    fast, images = view(network), torch.randn(70, 3, 16, 16, device=device)
    network.eval()
    with torch.no_grad():
        close(fast(images), network(images))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.train()
    twin = copy.deepcopy(network)
    labels, params = torch.randint(4, (70,), device=device), list(network.parameters())
    loss = F.cross_entropy(fast(images), labels)
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(F.cross_entropy(twin(images), labels), list(twin.parameters()))
    for grad, other in zip(grads, wanted):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-4 * max(1., float(other.abs().max())))
    for buffer, other in zip(network.buffers(), twin.buffers()):
        close(buffer, other)


@pytest.mark.parametrize("model, norm", NETWORKS)
def test_points_are_the_fallbacks_and_independent_of_grouping(device, model, norm):
    states = [copy.deepcopy(small_network(model, norm, device=device).state_dict()) for _ in range(2)]
    for state in states:
        for name, value in state.items():
            if value.is_floating_point() and "running_var" not in name:
                value.add_(torch.randn_like(value), alpha=.1)
    network = small_network(model, norm, device=device)
    mask = {name: torch.rand(w.shape, device=device) < .7 for name, w in prunable(network).items()}
    splits = [Split(torch.randn(n, 3, 16, 16, device=device), torch.randint(4, (n,), device=device))
              for n in (505, 7)]
    line = [(1 - a / 9, a / 9) for a in range(points.SHARING_GROUP + 1)]
    scores = evaluate_points(network, states, line, splits, mask)
    for weights, point in zip(line, scores):
        exact = copy.deepcopy(network).double().eval()
        doubles = [{name: value.double() for name, value in state.items()} for state in states]
        exact.load_state_dict(combine(doubles, weights, mask))
        for split, score in zip(splits, point):
            with torch.no_grad():
                logits = exact(split.images.double())
            losses = F.cross_entropy(logits, split.labels, reduction="none")
            assert score.loss == pytest.approx(losses.mean().item(), rel=1e-5)
            assert score.loss_error == pytest.approx((losses.std() / len(split) ** .5).item(), rel=1e-4)
            assert abs(score.accuracy - (logits.argmax(1) == split.labels).double().mean().item()) < 1.5 / len(split)
    assert [evaluate_points(network, states, [weights], splits, mask)[0] for weights in line] == scores


@pytest.fixture
def dense_only():
    """Zeros are not skipped."""
    before = views.skip_zeros.set("off")
    yield
    views.skip_zeros.reset(before)


def test_training_with_and_without_the_ops_agrees(monkeypatch, dense_only):
    torch.manual_seed(0)
    images, labels = torch.randn(96, 3, 16, 16), torch.randint(4, (96,))
    split, recipe = Split(images, labels), Recipe(6, lr=.05, batch_size=32)
    results = []
    for with_ops in (True, False):
        if not with_ops:
            monkeypatch.setattr(ops, "runs_on", lambda device_type: False)
        torch.manual_seed(1)
        network = small_network("convnet3", "instance")
        mask = {name: torch.rand(w.shape, generator=random_stream(0, name)) < .5
                for name, w in prunable(network).items()}
        losses = []
        train(network, split, recipe, random_stream(0, "order"), mask,
              progress=lambda training: losses.append(training.loss) if training.order is None else None)
        assert len(losses) == 6
        assert all(not network.get_parameter(name)[~kept].any() for name, kept in mask.items())
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_the_step_in_bfloat16_trains_alike(dense_only):
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 16, 16), torch.randint(4, (32,))
    recipe, losses = Recipe(2, lr=.05, batch_size=32), []
    for settings in (recipe, recipe._replace(amp=True)):
        torch.manual_seed(1)
        network = small_network("convnet3", "instance")
        mask = {name: w.abs() > w.abs().median() for name, w in prunable(network).items()}
        trained = train(network, Split(images, labels), settings, random_stream(0, "order"), mask)
        losses.append(trained.loss)
        assert all(not network.get_parameter(name)[~kept].any() for name, kept in mask.items())
    assert losses[1] == pytest.approx(losses[0], rel=.03)


#############################################
#            Finding and building           #
#############################################


def load_in_a_new_process(folder=ROOT, **environment):
    """(returned value or error, lines on stderr) of ops.load() called twice."""
    hidden = "" if folder == ROOT else f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    program = ("from common.errors import UserError\nfrom common.kernels import ops\n"
               "try: print(ops.load() and ops.load())\nexcept UserError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", hidden + program], cwd=folder, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"PYTHONPATH": str(folder)} | environment)
    return done.stdout.strip(), [line for line in done.stderr.splitlines() if line.startswith("csrc:")]


def test_the_environment_forces_the_choice_and_it_is_said_once():
    forced = "csrc: not compiled, PyTorch fallback: LOTTERY_OPS=fallback"
    assert load_in_a_new_process(LOTTERY_OPS="fallback") == ("False", [forced])
    assert load_in_a_new_process(LOTTERY_OPS="maybe") == ("LOTTERY_OPS=maybe: compiled or fallback", [])


@pytest.mark.skipif(not build.prebuilt(), reason="needs setup.py's extension")
def test_importing_the_extension_registers_the_ops():
    program = "import torch, lottery_csrc; print(torch.ops.lottery.combine_)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "lottery.combine_", done.stderr


@pytest.fixture
def bare_checkout(tmp_path):
    """The project without an extension, and a cache of its own."""
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    return tmp_path


def test_a_gpu_of_another_architecture_means_the_fallback(monkeypatch, capsys):
    def refused(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch, "ones", refused)
    assert not ops.runs_on.__wrapped__("cpu")
    said = "csrc: PyTorch fallback on cpu: CUDA error: no kernel image is available for execution on the device\n"
    assert capsys.readouterr().err == said


def fallback_reason(folder, **environment):
    value, lines = load_in_a_new_process(folder, TORCH_EXTENSIONS_DIR=str(folder / "cache"), **environment)
    if value == "True":
        pytest.skip("an extension is installed, and found first")
    return value, lines


def test_copied_alone_it_falls_back(bare_checkout):
    value, lines = fallback_reason(bare_checkout)
    assert value == "False"
    assert lines == ["csrc: not compiled, PyTorch fallback: no csrc/ beside common/, and no extension installed"]


def test_an_extension_that_cannot_be_loaded_is_built_again(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(build.NAME, tmp_path / "lottery_csrc.so")
    (tmp_path / "lottery_csrc.so").write_text(f"lottery-sources:{build.sources_hash()}, for another torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert build.prebuilt() is None
    assert "lottery_csrc.so cannot be loaded" in capsys.readouterr().err


def test_what_a_killed_build_left_is_removed(monkeypatch, tmp_path):
    @contextlib.contextmanager
    def killed(folder):
        folder.mkdir()
        (folder / f"{build.NAME}.so").write_text("half of it")
        yield

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "one_build_at_a_time", killed)
    with pytest.raises(ImportError):
        build.build()
    assert not list(tmp_path.rglob("*.so"))


def test_a_failing_compiler_means_the_fallback(bare_checkout):
    (bare_checkout / "csrc" / "cpu").mkdir(parents=True)
    (bare_checkout / "csrc" / "bindings.cpp").write_text("this is no C++;")
    value, lines = fallback_reason(bare_checkout)
    assert value == "False" and len(lines) == 2 and "error:" in lines[1] and lines[1].startswith("csrc: not compiled")
    value, lines = fallback_reason(bare_checkout, CXX="no-such-compiler")
    assert value == "False" and "no-such-compiler" in lines[-1]
    value, lines = fallback_reason(bare_checkout, LOTTERY_OPS="compiled")
    assert value.startswith("LOTTERY_OPS=compiled, but no extension:")
