"""Tickets: masks with their initial weights, and the files r<n>.pt that hold them."""
import functools
import hashlib
import itertools
from pathlib import Path

import torch

from . import data
from .augment import usual_augmentation
from .errors import UserError, first_line
from .files import difference, load, save
from .masks import dense_mask, sparsity
from .networks import build_network, check_network, prunable

FORMAT = "lottery-mask-1"
FILES_READ = {"dataset": "data_fingerprint", "distilled": "distilled_fingerprint", "start": "start_fingerprint"}
ENDPOINT_FORMAT = "lottery-endpoint-1"
SCORE_NAMES = {"magnitude": "magnitude at initialisation", "snip": "SNIP", "grasp": "GraSP", "synflow": "SynFlow"}
MAY_CHANGE = {"rounds", "sparse", "compile"}  # in a run that goes on: more rounds; the last two are of old configs
# What a run goes on with, how its subnetworks are evaluated, how it is computed: not how its masks were found.
SAME_SEARCH = {"rounds", "sparse", "compile", "data_dir"}
SAME_FAMILY = SAME_SEARCH | {"seed", "eval_epochs", "eval_lr", "eval_batch_size"}

#############################################
#              Making, reading              #
#############################################


def make_ticket(number, masks, init, config, results):
    """The ticket of round `number`: what a file r<number>.pt holds."""
    return {"format": FORMAT, "round": number, "sparsity": sparsity(masks), "masks": masks, "init": init,
            "config": config, "results": results}


def load_ticket(path, config=None, device="cpu", model=None, code=None):
    """The ticket in a file of prune.py: a dict with round, sparsity, masks, init, config, results.

    It must fit the network that its config describes, or the `model` at hand, of which a config need not know. A file
    may name a user's network, but its code is imported only when it is the one that `code` names. Also takes a state
    dict of torch.nn.utils.prune, for the network that `config`, or what it returns, describes. Raises UserError.
    """
    held = load(path, device)
    if not (isinstance(held, dict) and held.get("format") == FORMAT):
        state = state_dict_of(path, held)
        if config is None:
            raise UserError(f"{path}: a torch.nn.utils.prune state dict names no network; give --model and --dataset")
        held = from_torch_prune(path, state, config() if callable(config) else config)
    check_ticket(path, held, model, code)
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
                "augment": text("dsa", "imagenet", "none"), "cutmix": between(0, 1), "score": text()}
    for key, fits in (needed | optional).items():
        if not (fits(config.get(key)) or key in optional and config.get(key) is None):
            return key


def check_ticket(path, ticket, model=None, code=None):
    """Raises UserError unless a mask file's dict is complete, and its masks and initial state fit its network."""
    parts = {"config": dict, "masks": dict, "init": dict, "results": dict, "round": int, "sparsity": float}
    for key, kind in parts.items():
        if not isinstance(ticket.get(key), kind):
            raise UserError(f"{path}: mask file without {key}")
    keep = ticket["config"].get("keep") or []
    if not (isinstance(keep, list) and all(isinstance(pattern, str) for pattern in keep)):
        raise UserError(f"{path}: keep {keep!r} in its config is not one of prune.py")
    network = described_network(path, ticket["config"], code) if model is None else model
    masks = {name: torch.empty_like(weight, dtype=torch.bool) for name, weight in prunable(network, keep).items()}
    for part, expected in ("masks", masks), ("init", network.state_dict()):
        wrong = difference(kinds(ticket[part]), kinds(expected))
        if wrong:
            misfit = "are of another network than the one at hand"
            if model is None:
                misfit = f"do not fit its network {ticket['config']['model']}"
            raise UserError(f"{path}: its {part} {misfit}: {wrong} is {kinds(ticket[part]).get(wrong)}, "
                            f"wanted {kinds(expected).get(wrong)}")
    for name, _ in network.named_parameters():
        if not ticket["init"][name].isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity")


def kinds(tensors):
    """{name: type and shape in words} of a dict of tensors; what is none is left out."""
    return {name: f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for name, v in tensors.items()
            if torch.is_tensor(v) and v.layout == torch.strided}


def described_network(path, config, code=None):
    """The network that a mask file's config describes, for the shapes of its tensors. Raises UserError."""
    wrong = wrong_setting(config)
    if wrong:
        raise UserError(f"{path}: {wrong} {config.get(wrong)!r} in its config is not one of prune.py")
    own = ":" in config["model"]
    if own and config["model"] != code:
        raise UserError(f"{path}: its network is {config['model']}; its code is run only when you name it: "
                        f"--model {config['model']}")
    try:
        with torch.device("cpu" if own else "meta"):  # shapes, without the memory that a hostile file may ask for
            return build_network(config)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its config describes no network ({first_line(error)})") from error


#############################################
#     State dicts of torch.nn.utils.prune   #
#############################################


def state_dict_of(path, held):
    """The state dict with masks in what a file holds: itself, or under a key such as "state_dict". Raises UserError."""
    places = [held]
    if isinstance(held, dict):
        places += [value for value in held.values() if isinstance(value, dict)]
    for state in places:
        if isinstance(state, dict) and any(str(key).endswith("_mask") for key in state):
            return {str(key).removeprefix("module."): value for key, value in state.items() if torch.is_tensor(value)}
    keys = ", ".join(map(str, held))[:80] if isinstance(held, dict) else type(held).__name__
    raise UserError(f"{path}: not a mask file of prune.py, nor a torch.nn.utils.prune state dict (holds {keys}; wanted "
                    "names that end in weight_mask)")


def from_torch_prune(path, state, config):
    """A ticket of all that a state dict holds: weights, masks, biases, norms and statistics, matched to our names.

    Layers are matched in order, and what is in them by name and shape. A weight without a mask survives whole.
    """
    model = build_network(config, config.get("seed", 0))
    plain = {name.removesuffix("_orig") if f"{name.removesuffix('_orig')}_mask" in state else name: value
             for name, value in state.items() if not name.endswith("_mask")}
    wanted = model.state_dict()
    names = matched_names(path, plain, wanted, config["model"])
    init = {names[name]: value.to(wanted[names[name]].dtype) for name, value in plain.items()}
    masks = dense_mask(model, config.get("keep"))
    for name, mask in state.items():
        if name.endswith("_mask"):
            masks[masked_weight(path, name, names, masks)] = hard_mask(path, name, mask)
    return make_ticket(0, masks, {name: init[name] for name in wanted}, config | {"imported": Path(path).stem}, {})


def matched_names(path, found, wanted, model):
    """{name in a file's state: name in ours}, layer by layer in order. Raises UserError where they do not fit."""
    files_layers, our_layers = layers_of(found), layers_of(wanted)
    names = {}
    for theirs, ours in itertools.zip_longest(files_layers, our_layers):
        file_layer, our_layer = files_layers.get(theirs, {}), our_layers.get(ours, {})
        if shapes(file_layer) != shapes(our_layer):
            raise UserError(f"{path}: layer {theirs or 'missing'} {in_words(file_layer)} is not {model}'s "
                            f"{ours or 'missing'} {in_words(our_layer)} (--model, --width, --norm and --dataset "
                            "choose the network)")
        names |= {f"{theirs}.{leaf}".lstrip("."): f"{ours}.{leaf}".lstrip(".") for leaf in file_layer}
    return names


def shapes(layer):
    return {leaf: tuple(value.shape) for leaf, value in layer.items()}


def layers_of(state):
    """{layer: {parameter's last name: tensor}} of a state dict, in order."""
    layers = {}
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = value
    return layers


def in_words(layer):
    """The tensors of a layer in words."""
    return ", ".join(f"{leaf} {shape}" for leaf, shape in shapes(layer).items())


def masked_weight(path, mask_name, names, masks):
    """Our name of the weight that a file's mask belongs to. Raises UserError for what is not pruned here."""
    name = names.get(mask_name.removesuffix("_mask"))
    if name not in masks:
        raise UserError(f"{path}: {mask_name}: only the weights of convolutions and linear layers are pruned here, and "
                        "those that --keep leaves dense are not; "
                        f"prune.remove(module, {mask_name.removesuffix('_mask').rpartition('.')[2]!r}) before saving")
    return name


def hard_mask(path, name, mask):
    """A mask as bool. Raises UserError when it is not made of zeros and ones."""
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError(f"{path}: {name} is a soft mask, with values from {float(mask.min()):.3g} to "
                        f"{float(mask.max()):.3g}; wanted zeros and ones")
    return mask.bool().contiguous()


def export(to, path):
    """Write what the file `path` holds to the file `to`, for use without this project. Raises UserError.

    Of a ticket the state dict of a network pruned by torch.nn.utils.prune (weight_orig, weight_mask, and all else as
    it is), of an endpoint its state dict. No code of the network is run.
    """
    if Path(to).suffix not in (".pt", ".pth"):
        raise UserError(f"--export {to}: wanted a name that ends in .pt or .pth")
    if Path(to).exists():
        raise UserError(f"--export {to}: is there already; choose another name")
    held = load(path)
    known = isinstance(held, dict) and held.get("format")
    if known == ENDPOINT_FORMAT and held.get("epochs_done") == held.get("epochs"):
        return save(to, held["state"])
    if known != FORMAT:
        raise UserError(f"{path}: neither a mask file of prune.py nor a finished endpoint")
    masks, init = held["masks"], held["init"]
    if not masks.keys() <= init.keys():
        raise UserError(f"{path}: masks without weights")
    state = {f"{name}_orig" if name in masks else name: value for name, value in init.items()}
    save(to, state | {f"{name}_mask": kept.to(init[name].dtype) for name, kept in masks.items()})


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
    if config.get("imported"):
        return f"imported {config['imported']}"
    names = {"distilled": f"synthetic, {config.get('ipc')} a class", "real": "IMP",
             "subset": f"real subset, {config.get('ipc')} a class", "random": "random masks"}
    parts = [names.get(config.get("data"), "own data")]
    if config.get("score"):
        parts = [SCORE_NAMES.get(config["score"], config["score"])]
    if config.get("score") in ("snip", "grasp"):  # the others look at no image
        parts.append(names.get(config.get("data"), "own data").replace("IMP", "real data"))
    if config.get("rewind"):
        parts.append(f"rewound to epoch {config['rewind']}")
    if config.get("start"):
        parts.append(f"from {Path(config['start']).stem}")
    if config.get("shuffle"):
        parts.append("shuffled")
    if config.get("reinit") is not None:
        parts.append("drawn anew")
    return ", ".join(parts)


def family_names(configs, same=SAME_FAMILY):
    """The family of every config, told apart from others of its kind by all settings in which they differ.

    Those in `same` make no difference: runs that differ in the seed alone are one family.
    """
    kinds_of = [family(config) for config in configs]
    names = []
    for kind, config in zip(kinds_of, configs):
        alike = [other for other, its_kind in zip(configs, kinds_of) if its_kind == kind]
        marks = [mark(key, config.get(key)) for key in differing_keys(alike, same)]
        names.append(", ".join([kind, *marks]))
    return names


def differing_keys(configs, same):
    """The settings in which configs differ, without those in `same`.

    What a file held counts, not where it lay; what a run did not read makes no difference.
    """
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in same))
    values = {key: {repr(config.get(key)) for config in configs} for key in keys}
    for path, sha in FILES_READ.items():
        if sha in values and "None" not in values[sha]:
            values.pop(path if len(values[sha]) == 1 or len(values[path]) == 1 else sha, None)
        else:
            values.pop(sha, None)
    return [key for key, different in values.items() if len(different) > 1]


def changed_setting(earlier, config):
    """The first setting by which a run's config is not that of an earlier one, or None; files by content."""
    ignored = set(MAY_CHANGE)
    for path, sha in FILES_READ.items():
        known = None not in (earlier.get(sha), config.get(sha))
        ignored.add(path if known else sha)
    return difference(earlier, config, ignored)


def mark(key, value):
    """A setting in the words of a legend."""
    if key in ("distilled", "start") and value:
        return Path(value).stem
    if key.endswith("fingerprint"):
        return f"{key.partition('_')[0]} {str(value)[:6]}"
    return f"{key.replace('_', ' ')} {value}"


def names_of(tickets):
    """A name for every ticket where none are averaged: its family, and the seed and evaluation where these differ."""
    names = family_names([ticket["config"] for ticket in tickets], SAME_SEARCH)
    dense = {name for name, ticket in zip(names, tickets) if not ticket["sparsity"]}
    of_dense = "dense ({})" if len(dense) > 1 else "dense"
    return [name if ticket["sparsity"] else of_dense.format(name) for name, ticket in zip(names, tickets)]


def labels(tickets):
    """Name and sparsity of every ticket."""
    return [f"{name}, {100 * ticket['sparsity']:.3g}% sparse" if ticket["sparsity"] else name
            for name, ticket in zip(names_of(tickets), tickets)]


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
    if not (args.dataset or paths):
        raise UserError("no --mask given; --dataset digits takes a dense network and needs no mask file")
    by_flags = functools.cache(lambda: unnamed_config(args, device))  # asked for only where a mask names no network
    config_of = (lambda: by_flags()[0]) if args.dataset else None
    tickets = {path: load_ticket(path, config_of, device, code=args.model) for path in ticket_files(paths)}
    if not paths:
        unnamed = config_of()
        model = build_network(unnamed, unnamed["seed"]).to(device)
        path = Path(unnamed["dataset"]) / "dense.pt"
        tickets[path] = make_ticket(0, dense_mask(model), model.state_dict(), unnamed, {})
    config = common_config(tickets)
    check_flags(args, config)
    config |= {key: getattr(args, key) for key in ("dataset", "train_images") if getattr(args, key)}
    real = by_flags()[1] if by_flags.cache_info().currsize else None
    if real is None or real[0].fingerprint != config.get("data_fingerprint"):
        real = data.load_real(config, args.data_dir, device)
    train, test = data.fixed_subset(real[0], config.get("train_images"), "subset"), real[1]
    for ticket in tickets.values():  # one found on synthetic data alone has not met it yet
        ticket["config"] = ticket["config"] | {"data_fingerprint": config["data_fingerprint"]}
    model = build_network(config).to(device)
    check_network(model, *train.batch(slice(0, 2)), config["num_classes"])
    return tickets, train, test


def unnamed_config(args, device):
    """(config, (train, test)) of the network that --model, --dataset, --width and --norm describe, on real data."""
    config = dict(model=args.model or "convnet3", dataset=args.dataset, width=args.width, norm=args.norm,
                  seed=args.seed or 0, image_size=args.image_size, data="real", eval_epochs=60)
    real = data.load_real(config, args.data_dir, device)
    if config["image_size"] > 64:
        config |= usual_augmentation(config["image_size"])
    return config, real


def common_config(tickets):
    """The config of the first of {path: ticket}, with a fingerprint of the data if one has it.

    Raises UserError unless they are of one network and one dataset.
    """
    first_path, first = next(iter(tickets.items()))
    config = dict(first["config"])
    for path, other in tickets.items():
        for key in ("model", "dataset", "width", "norm", "image_size", "train_images"):
            one, two = config.get(key), other["config"].get(key)
            told_by_content = key == "dataset" and has_fingerprint(config) and has_fingerprint(other["config"])
            if one != two and not told_by_content:
                raise UserError(f"{path} has {key} {two}, {first_path} {one}; give masks of one network and dataset")
        sha = other["config"].get("data_fingerprint")
        if sha and config.get("data_fingerprint") not in (None, sha):
            raise UserError(f"{path} was found on other data than the masks before it (fingerprint {sha}, not "
                            f"{config['data_fingerprint']})")
        config["data_fingerprint"] = sha or config.get("data_fingerprint")
    return config


def has_fingerprint(config):
    return config.get("data_fingerprint") is not None


def check_flags(args, config):
    """Raises UserError for a flag that describes another network or dataset than the masks' `config` does."""
    for key in ("model", "width", "norm", "image_size"):
        given, own = getattr(args, key), config.get(key)
        if given in (None, own):
            continue
        usual = own is None and shapes_of(config) == shapes_of(config | {key: given})
        if not usual:
            raise UserError(f"--{key.replace('_', '-')} {given}: the masks name their network, of {key} "
                            f"{own or 'as usual'}; leave the flag out")
    same_name = args.dataset and data.dataset_name(args.dataset) == data.dataset_name(config["dataset"])
    if args.dataset and not same_name and not has_fingerprint(config):
        raise UserError(f"the masks are of dataset {config['dataset']}, not --dataset {args.dataset}")


def shapes_of(config):
    """{name: type and shape in words} of the state of the network that `config` describes."""
    with torch.device("cpu" if ":" in config["model"] else "meta"):
        return kinds(build_network(config).state_dict())
