"""Tickets: masks with their initial weights, and the files r<n>.pt that hold them."""
import hashlib
from pathlib import Path

import torch

from . import data
from .errors import UserError
from .files import load
from .masks import dense_mask, sparsity
from .networks import build_network, prunable

FORMAT = "lottery-mask-1"

#############################################
#              Making, reading              #
#############################################


def make_ticket(number, masks, init, config, results):
    """The ticket of round `number`: what a file r<number>.pt holds."""
    return {"format": FORMAT, "round": number, "sparsity": sparsity(masks), "masks": masks, "init": init,
            "config": config, "results": results}


def load_ticket(path, config=None, device="cpu", model=None):
    """The ticket in a file of prune.py: a dict with round, sparsity, masks, init, config, results.

    It must fit the network that its config describes, or the `model` at hand, of which a config need not know.
    Also takes a torch.nn.utils.prune state dict (`weight_orig`, `weight_mask`); its tensors are matched to the
    prunable weights of the network that `config` describes, in order. Raises UserError.
    """
    held = load(path, device)
    if not isinstance(held, dict):
        held = {}
    if held.get("format") != FORMAT:
        if not any(str(key).endswith("weight_mask") for key in held):
            raise UserError(f"{path}: not a mask file of prune.py, nor a torch.nn.utils.prune state dict")
        if config is None:
            raise UserError(f"{path}: a torch.nn.utils.prune state dict names no network; give --model and --dataset")
        held = from_torch_prune(path, held, config)
    check_ticket(path, held, model)
    return held


def wrong_setting(config):
    """A key of a mask file's config that lacks a value, or has one that prune.py would not have written; or None."""
    def text(*known):
        return lambda value: isinstance(value, str) and (not known or value in known)

    def count(value):
        return type(value) is int and value > 0

    def between(least, most):
        return lambda value: isinstance(value, (int, float)) and least <= value <= most

    needed = {"model": text(), "dataset": text(), "channels": count, "image_size": count, "num_classes": count,
              "data": text("distilled", "real", "subset", "random"), "seed": lambda value: type(value) is int,
              "eval_epochs": count}
    optional = {"width": count, "norm": text("instance", "batch", "none"), "train_images": count, "ipc": count,
                "lr": between(0, 1e6), "momentum": between(0, 1), "weight_decay": between(0, 1e6), "batch_size": count,
                "augment": text("dsa", "imagenet", "none"), "cutmix": between(0, 1)}
    for key, fits in (needed | optional).items():
        if not (fits(config.get(key)) or key in optional and config.get(key) is None):
            return key


def check_ticket(path, ticket, model=None):
    """Raises UserError unless a mask file's dict is complete, and its masks and initial state fit its network."""
    parts = {"config": dict, "masks": dict, "init": dict, "results": dict, "round": int, "sparsity": float}
    wrong = next((key for key, kind in parts.items() if not isinstance(ticket.get(key), kind)), None)
    if wrong:
        raise UserError(f"{path}: mask file without {wrong}")
    network = described_network(path, ticket["config"]) if model is None else model
    masks = {name: torch.empty_like(weight, dtype=torch.bool) for name, weight in prunable(network).items()}
    for part, expected in ("masks", masks), ("init", network.state_dict()):
        held = {name: (v.shape, v.dtype, v.layout) for name, v in ticket[part].items() if torch.is_tensor(v)}
        if held != {name: (v.shape, v.dtype, v.layout) for name, v in expected.items()}:
            if model is not None:
                raise UserError(f"{path}: its {part} are of another network than the one at hand")
            raise UserError(f"{path}: its {part} do not fit its network {ticket['config']['model']}")
    broken = next((name for name, _ in network.named_parameters() if not ticket["init"][name].isfinite().all()), None)
    if broken:
        raise UserError(f"{path}: {broken} holds NaN or infinity")


def described_network(path, config):
    """The network that a mask file's config describes, for the shapes of its tensors. Raises UserError."""
    wrong = wrong_setting(config)
    if wrong:
        raise UserError(f"{path}: {wrong} {config.get(wrong)!r} in its config is not one of prune.py")
    own = ":" in config["model"]
    try:
        with torch.device("cpu" if own else "meta"):  # shapes, without the memory that a hostile file may ask for
            return build_network(config)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its config describes no network ({str(error)[:80]})") from error


def from_torch_prune(path, state, config):
    """A ticket from `<name>_orig` and `<name>_mask` entries, matched to our names by order and shape."""
    model = build_network(config, config.get("seed", 0))
    found = [(state.get(key[:-4] + "orig"), state[key]) for key in map(str, state) if key.endswith("weight_mask")]
    names = list(prunable(model))
    shapes = [(weight.shape, weight.shape) for weight in prunable(model).values()]
    if [tuple(v.shape for v in pair if torch.is_tensor(v)) for pair in found] != shapes:
        raise UserError(f"{path}: {len(found)} masked weights that do not fit {config['model']} "
                        f"(--model, --width and --dataset choose the network)")
    init = model.state_dict()
    init.update({name: weight for name, (weight, _) in zip(names, found)})
    masks = {name: m.bool() for name, (_, m) in zip(names, found)}
    return make_ticket(0, masks, init, dict(config), {})


def fingerprint(ticket):
    """sha256 over the masks and the initial state of a ticket."""
    return tensors_sha(ticket["masks"], ticket["init"])


def tensors_sha(*parts):
    """sha256 over dicts of tensors: their names and values."""
    digest = hashlib.sha256()
    for part in parts:
        for name, value in sorted(part.items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


#############################################
#              In tables, legends           #
#############################################


def family(config):
    """How a mask was found, in the words of legends and tables."""
    names = {"distilled": f"synthetic, {config.get('ipc')} a class", "real": "IMP",
             "subset": f"real subset, {config.get('ipc')} a class", "random": "random masks"}
    rewound = f", rewound to epoch {config['rewind']}" if config.get("rewind") else ""
    started = f", from {Path(config['start']).stem}" if config.get("start") else ""
    return names.get(config.get("data"), "own data") + rewound + started


def label(ticket):
    """Family and sparsity of a ticket."""
    percent = 100 * ticket["sparsity"]
    return f"{family(ticket['config'])}, {percent:.3g}% sparse" if percent else "dense"


#############################################
#          As a command names them          #
#############################################


def round_files(folder):
    """The files r<n>.pt in a folder, in no order."""
    return [path for path in Path(folder).glob("r*.pt") if path.stem[1:].isdigit()]


def ticket_files(items):
    """Mask files as given; of folders, the r<n>.pt in them, by rounds. Raises UserError for a folder without."""
    files = []
    for item in map(Path, items):
        found = round_files(item) if item.is_dir() else [item]
        if not found:
            raise UserError(f"{item}: no r0.pt, r1.pt, ... of prune.py in this folder")
        files += sorted(found, key=lambda path: (len(path.name), path.name))
    return files


def load_tickets(paths, args, device):
    """({path: ticket}, train, test) of the mask files (or folders of them), all of one network on one dataset.

    `args` holds what cli.ticket_flags adds. Without paths: the dense network of --dataset, under the path
    <dataset>/dense.pt. Raises UserError.
    """
    unnamed = unnamed_config(args) if args.dataset else None
    if not (unnamed or paths):
        raise UserError("no --mask given; --dataset digits takes a dense network and needs no mask file")
    tickets = {path: load_ticket(path, unnamed, device) for path in ticket_files(paths)}
    if not paths:
        model = build_network(unnamed, unnamed["seed"]).to(device)
        path = Path(Path(args.dataset).name) / "dense.pt"
        tickets[path] = make_ticket(0, dense_mask(model), model.state_dict(), unnamed, {})
    check_alike(tickets, args.dataset)
    first = next(iter(tickets.values()))
    return tickets, *data.load_real(dict(first["config"]), args.data_dir, device)


def unnamed_config(args):
    """The config of the network that --model, --dataset, --width and --norm describe, trained on real data."""
    config = dict(model=args.model, dataset=args.dataset, width=args.width, norm=args.norm, seed=args.seed or 0,
                  data="real", eval_epochs=60)
    data.load_real(config, args.data_dir)
    if config["image_size"] > 64:
        config |= dict(augment="imagenet", cutmix=1.)
    return config


def check_alike(tickets, dataset):
    """Raises UserError unless the tickets are of one network and one dataset, that of --dataset if it is given."""
    first_path, first = next(iter(tickets.items()))
    for path, other in tickets.items():
        for key in ("model", "dataset", "width", "norm", "image_size", "train_images"):
            one, two = first["config"].get(key), other["config"].get(key)
            if one != two:
                raise UserError(f"{path} has {key} {two}, {first_path} {one}; give masks of one network and dataset")
    if dataset not in (None, first["config"]["dataset"]):
        raise UserError(f"{first_path} is of dataset {first['config']['dataset']}, not --dataset {dataset}")
