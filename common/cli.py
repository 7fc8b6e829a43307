"""How a script starts and ends: flags and their types, the device, one line for a mistake, Ctrl-C."""
import argparse
import ctypes
import math
import sys
from pathlib import Path

import torch

from . import ranks
from .errors import UserError
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


def run(main):
    """Call a script's main() and turn a UserError into exit code 2, Ctrl-C into 130."""
    keep_freed_memory()
    try:
        with ranks.all_ranks():
            main()
    except UserError as error:
        ranks.print_once(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        ranks.print_once("\nstopped: the same command goes on from the last finished step")
        sys.exit(130)


def start(args):
    """The device that --device names; from here on zeros are skipped as --sparse says. Raises UserError."""
    views.skip_zeros.set(getattr(args, "sparse", None) or "auto")
    device = choose_device(args.device)
    ops.load()  # the kernels say once, before the work begins, what they are
    return device


def choose_device(name=None):
    """The torch.device that --device names; CUDA when there is one, else the CPU. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
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

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def at_least(least):
    """argparse type: a whole number, `least` or more."""
    def number(text):
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


positive = at_least(1)


def within(least, most=math.inf):
    """argparse type: a finite number from `least` to `most`."""
    def parsed(text):
        value = float(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g} to {most:g}")
        return value

    return parsed


def folder(text):
    """argparse type: the path of a folder that is there or can be made."""
    path = Path(text)
    if any(place.is_file() for place in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"{text} is not a folder's path: a file is in its place")
    return path


def ticket_flags(parser):
    """Add the flags that name tickets and their training on real data, for load_tickets and endpoint."""
    flag = parser.add_argument_group("tickets").add_argument
    flag("--mask", nargs="+", default=[], metavar="FILE",
         help="mask files of prune.py or folders of them; with --dataset torch.nn.utils.prune states")
    flag("--dataset", help="of masks that name none; or without --mask, of a dense one (digits: offline)")
    flag("--model", default="convnet3", help="of masks that name none, or of the dense one (convnet3)")
    flag("--width", type=positive, help="its channels in the first layer (convnet3: 128, resnet: 32)")
    flag("--norm", choices=("instance", "batch", "none"), help="its normalisation (convnet3: instance, resnet: batch)")
    flag("--data-dir", default="data", help="folder searched for <dataset>/, and downloaded to (data)")
    flag("--epochs", type=positive, help="of training on real data (the mask's eval_epochs, else 60)")
    sparse_flag(parser)
    flag("--seed", type=int, help="of the data orders (the mask file's)")
    flag("--device", help="(cuda when there is one, else cpu)")


def sparse_flag(parser):
    parser.add_argument("--sparse", choices=("auto", "on", "off"), default="auto",
                        help="skip pruned weights on a CPU: where it is faster, always or never (auto)")
