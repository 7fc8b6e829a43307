"""How a script starts and ends: flags and their types, the device, one line for a mistake, Ctrl-C."""
import argparse
import ctypes
import math
import os
import signal
import sys
from pathlib import Path

import torch

from . import curves, interrupts, ranks
from .errors import UserError, first_line, is_of_memory, plain
from .kernels import ops, views

#############################################
#                 Starting                  #
#############################################


def keep_freed_memory():
    """Let glibc reuse large blocks: given back to the system, their page faults take a third of convnet3's CPU time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def open_streams():
    """Give a closed stdin, stdout or stderr (`>&-`) to the null device: no file of ours may get its number."""
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def close_stdout():
    """Let go of what cannot be printed, for the interpreter would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run(main):
    """Call a script's main(); turn a UserError and what the system refuses into exit code 2, Ctrl-C into 130."""
    open_streams()
    keep_freed_memory()
    interrupts.install()
    try:
        with ranks.all_ranks():
            main()
    except UserError as error:
        fail(error)
    except BrokenPipeError:  # `| head`
        close_stdout()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk behind stdout, too many open files
        close_stdout()
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not is_of_memory(error):
            raise
        fail(f"not enough memory ({first_line(error)}); take a smaller network, batch or image")
    except interrupts.Stopped as stopped:
        ranks.print_once("\nstopped: the same command goes on from where it is now")
        sys.exit(128 + stopped.number)


def fail(error):
    """End with one line on stderr, in which no control code of a file's name reaches the terminal, and exit code 2."""
    ranks.print_once(f"error: {plain(error)}")
    sys.exit(2)


def start(args):
    """The device that --device names; from here on zeros are skipped as --sparse says, and curves go where --log says.

    Raises UserError.
    """
    views.skip_zeros.set(getattr(args, "sparse", None) or "auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.deterministic = True  # one seed, one mask, on a GPU too
    curves.choose_log(args.log)
    device = choose_device(args.device)
    ops.load()  # the kernels say once, before the work begins, what they are
    return device


def choose_device(name=None):
    """The torch.device that --device names; CUDA when there is one, else the CPU. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and torch.cuda.is_available():  # make it current: streams and graphs are made there
            torch.cuda.set_device(ranks.own_gpu() if device.index is None else device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not a device of this machine's PyTorch") from error
    return device


#############################################
#                   Flags                   #
#############################################


class Parser(argparse.ArgumentParser):
    """Help made of the script's docstring; a wrong flag is one line, like every other mistake."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        for flag, value in zip(["the first argument", *argv], argv):
            if not value.strip():
                raise UserError(f"{flag}: empty, as a variable of the shell is that was not set")
        return super().parse_args(argv)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def at_least(least, most=10 ** 9):
    """argparse type: a whole number from `least` to `most`."""
    def number(text):
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least {least} "
                                             f"(and at most {most:,})")
        return int(text)

    return number


positive = at_least(1)
width = at_least(1, 8192)  # channels
side = at_least(1, 4096)  # pixels


def seed(text):
    """argparse type: a whole number that seeds random numbers."""
    if not (text.removeprefix("-").isdigit() and abs(int(text[:20])) <= 2 ** 40):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from -2^40 to 2^40")
    return int(text)


def within(least, most=math.inf):
    """argparse type: a finite number from `least` to `most`."""
    def parsed(text):
        value = float(text)  # argparse names what is no number at all
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g} to {most:g}")
        return value

    return parsed


def share_of(flag):
    """argparse type: a number between 0 and 1."""
    def number(text):
        if not 0 < float(text) < 1:
            raise UserError(f"{flag} {text}: must lie between 0 and 1, both excluded")
        return float(text)

    return number


def folder(text):
    """argparse type: the path of a folder that is there or can be made."""
    path = Path(text)
    try:
        blocked = any(place.exists() and not place.is_dir() for place in (path, *path.parents))
    except OSError as error:  # too long a name, for one
        raise argparse.ArgumentTypeError(f"{text[:60]}...: {error.strerror}") from None
    if blocked:
        raise argparse.ArgumentTypeError(f"{text} is not a folder's path: a file is in its place")
    return path


def ticket_flags(parser):
    """Add the flags that name tickets and their training on real data, for load_tickets and endpoint."""
    flag = parser.add_argument_group("tickets").add_argument
    flag("--mask", nargs="+", default=[], metavar="FILE",
         help="mask files of prune.py or folders of them; with --dataset torch.nn.utils.prune states")
    flag("--dataset", help="of masks that name none; or without --mask, of a dense one (digits: offline)")
    flag("--model", help="of masks that name none, or of the dense one: convnet3, resnet10, resnet18 "
                                             "or package.module:callable, whose code runs only when named (convnet3)")
    flag("--width", type=width, help="its channels in the first layer (convnet3: 128, resnet: 32)")
    flag("--norm", choices=("instance", "batch", "none"), help="its normalisation (convnet3: instance, resnet: batch)")
    place_flags(parser)
    flag("--epochs", type=positive, help="of training on real data (the mask's eval_epochs, else 60)")
    flag("--lr", type=within(0), help="of training on real data (the mask's)")
    flag("--batch-size", type=positive, help="of training on real data (the mask's)")
    flag("--train-images", type=positive, help="use only so many real training images (the mask's)")
    flag("--seed", type=seed, help="of the data orders (the mask file's)")
    sparse_flag(parser)
    machine_flags(parser)


def place_flags(parser):
    flag = parser.add_argument
    flag("--data-dir", default="data", help="folder searched for <dataset>/, and downloaded to (data)")
    flag("--image-size", type=side, help="side in pixels of images in class folders (the mask's or dataset's)")


def machine_flags(parser):
    flag = parser.add_argument
    flag("--device", help="(cuda when there is one, else cpu)")
    flag("--tf32", action="store_true", help="let a GPU round products to TF32 (not measured)")
    flag("--log", choices=("tensorboard",),
         help="write the curves of trainings, which are in curves.csv, to <folder>/tensorboard/ as well")


def sparse_flag(parser):
    parser.add_argument("--sparse", choices=("auto", "on", "off"), default="auto",
                        help="skip pruned weights on a CPU: where it is faster, always or never (auto)")
