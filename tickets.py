"""Tickets: the mask files of prune.py, and the subnetworks that they name, trained on real data.

An end point is a subnetwork trained from its initial weights in one data order. It is trained once, kept, and found
again by the other scripts.
"""
import hashlib
import itertools
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common
import ranks
import splits
from common import UserError, positive, random_stream

MASK_FORMAT = "lottery-mask-1"
ENDPOINT_FORMAT = "lottery-endpoint-1"

#############################################
#                Mask files                 #
#############################################


def load_mask(path, config=None, device="cpu"):
    """A mask file as prune.py writes it: a dict with round, sparsity, masks, init, config, results.

    Also takes a torch.nn.utils.prune state dict (`weight_orig`, `weight_mask`); its tensors are matched to the
    prunable weights of the network that `config` describes, in order. Raises UserError.
    """
    data = common.load(path, device)
    if not isinstance(data, dict):
        data = {}
    if data.get("format") != MASK_FORMAT:
        if not any(str(key).endswith("weight_mask") for key in data):
            raise UserError(f"{path}: not a mask file of prune.py, nor a torch.nn.utils.prune state dict")
        if config is None:
            raise UserError(f"{path}: a torch.nn.utils.prune state dict names no network; give --model and --dataset")
        data = from_torch_prune(path, data, config)
    check_mask(path, data)
    return data


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
                "augment": text("dsa", "imagenet", "none"), "cutmix": between(0, 1),
                "sparse": text("auto", "on", "off")}
    for key, fits in (needed | optional).items():
        if not (fits(config.get(key)) or key in optional and config.get(key) is None):
            return key


def check_mask(path, data):
    """Raises UserError unless a mask file's dict is complete and its masks and initial state fit its network."""
    parts = {"config": dict, "masks": dict, "init": dict, "results": dict, "round": int, "sparsity": float}
    wrong = next((key for key, kind in parts.items() if not isinstance(data.get(key), kind)), None)
    if wrong:
        raise UserError(f"{path}: mask file without {wrong}")
    config = data["config"]
    if wrong := wrong_setting(config):
        raise UserError(f"{path}: {wrong} {config.get(wrong)!r} in its config is not one of prune.py")
    own = ":" in config["model"]
    try:
        with torch.device("cpu" if own else "meta"):  # shapes, without the memory that a hostile file may ask for
            network = common.build_network(config)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its config describes no network ({str(error)[:80]})") from error
    masks = {name: torch.empty_like(weight, dtype=torch.bool) for name, weight in common.prunable(network).items()}
    for part, expected in ("masks", masks), ("init", network.state_dict()):
        held = {name: (v.shape, v.dtype, v.layout) for name, v in data[part].items() if torch.is_tensor(v)}
        if held != {name: (v.shape, v.dtype, v.layout) for name, v in expected.items()}:
            raise UserError(f"{path}: its {part} do not fit its network {config['model']}")
    broken = next((name for name, _ in network.named_parameters() if not data["init"][name].isfinite().all()), None)
    if broken:
        raise UserError(f"{path}: {broken} holds NaN or infinity")


def from_torch_prune(path, state, config):
    """A mask file's dict from `<name>_orig` and `<name>_mask` entries, matched to our names by order and shape."""
    model = common.build_network(config, config.get("seed", 0))
    found = [(state.get(key[:-4] + "orig"), state[key]) for key in map(str, state) if key.endswith("weight_mask")]
    names = list(common.prunable(model))
    shapes = [(weight.shape, weight.shape) for weight in common.prunable(model).values()]
    if [tuple(v.shape for v in pair if torch.is_tensor(v)) for pair in found] != shapes:
        raise UserError(f"{path}: {len(found)} masked weights that do not fit {config['model']} "
                        f"(--model, --width and --dataset choose the network)")
    init = model.state_dict()
    init.update({name: weight for name, (weight, _) in zip(names, found)})
    masks = {name: m.bool() for name, (_, m) in zip(names, found)}
    return {"format": MASK_FORMAT, "round": 0, "sparsity": common.sparsity(masks), "masks": masks, "init": init,
            "config": dict(config), "results": {}}


def family(config):
    """How a mask was found, in the words of legends and tables."""
    names = {"distilled": f"synthetic, {config.get('ipc')} a class", "real": "IMP",
             "subset": f"real subset, {config.get('ipc')} a class", "random": "random masks"}
    rewound = f", rewound to epoch {config['rewind']}" if config.get("rewind") else ""
    started = f", from {Path(config['start']).stem}" if config.get("start") else ""
    return names[config["data"]] + rewound + started


def label(subnetwork):
    """Family and sparsity of a mask file's dict."""
    percent = 100 * subnetwork["sparsity"]
    return f"{family(subnetwork['config'])}, {percent:.3g}% sparse" if percent else "dense"


#############################################
#                Subnetworks                #
#############################################


def subnetwork_flags(parser):
    """Add the flags that name subnetworks and their training on real data, for load_subnetworks and endpoint."""
    group = parser.add_argument_group("subnetworks")
    group.add_argument("--mask", nargs="+", default=[], metavar="FILE",
                       help="mask files of prune.py or folders of them; with --dataset torch.nn.utils.prune states")
    group.add_argument("--dataset", help="of masks that name none; or without --mask, of a dense one (digits: offline)")
    group.add_argument("--model", default="convnet3", help="of masks that name none, or of the dense one (convnet3)")
    group.add_argument("--width", type=positive, help="its channels in the first layer (convnet3: 128, resnet: 32)")
    group.add_argument("--norm", choices=("instance", "batch", "none"),
                       help="its normalisation (convnet3: instance, resnet: batch)")
    group.add_argument("--data-dir", default="data", help="folder searched for <dataset>/, and downloaded to (data)")
    group.add_argument("--epochs", type=positive, help="of training on real data (the mask's eval_epochs, else 60)")
    group.add_argument("--sparse", choices=("auto", "on", "off"),
                       help="skip pruned weights on a CPU: where it is faster, always or never (auto)")
    group.add_argument("--seed", type=int, help="of the data orders (the mask file's)")
    group.add_argument("--device", help="(cuda when there is one, else cpu)")


def mask_files(items):
    """Mask files as given; of folders, the r<n>.pt in them, by rounds. Raises UserError for a folder without."""
    files = []
    for item in map(Path, items):
        found = [path for path in item.glob("r*.pt") if path.stem[1:].isdigit()] if item.is_dir() else [item]
        if not found:
            raise UserError(f"{item}: no r0.pt, r1.pt, ... of prune.py in this folder")
        files += sorted(found, key=lambda path: (len(path.name), path.name))
    return files


def load_subnetworks(paths, args):
    """({path: mask file's dict}, train, test) of the masks (files or folders), all of one network on one dataset.

    `args` holds what subnetwork_flags adds. Without paths: the dense network of --dataset, under the path
    <dataset>/dense.pt. Raises UserError.
    """
    device = common.choose_device(args.device)
    unnamed = None
    if args.dataset:
        unnamed = dict(model=args.model, dataset=args.dataset, width=args.width, norm=args.norm, seed=args.seed or 0,
                       data="real", eval_epochs=60)
        splits.load_real(unnamed, args.data_dir)
        unnamed |= dict(augment="imagenet", cutmix=1.) if unnamed["image_size"] > 64 else {}
    elif not paths:
        raise UserError("no --mask given; --dataset digits takes a dense network and needs no mask file")
    subnetworks = {path: load_mask(path, unnamed, device) for path in mask_files(paths)}
    if not paths:
        model = common.build_network(unnamed, unnamed["seed"]).to(device)
        subnetworks[Path(Path(args.dataset).name) / "dense.pt"] = {
            "format": MASK_FORMAT, "round": 0, "sparsity": 0., "masks": common.dense_mask(model),
            "init": model.state_dict(), "config": unnamed, "results": {}}
    first_path, first = next(iter(subnetworks.items()))
    for path, other in subnetworks.items():
        for key in ("model", "dataset", "width", "norm", "image_size", "train_images"):
            one, two = first["config"].get(key), other["config"].get(key)
            if one != two:
                raise UserError(f"{path} has {key} {two}, {first_path} {one}; give masks of one network and dataset")
    if args.dataset not in (None, first["config"]["dataset"]):
        raise UserError(f"{first_path} is of dataset {first['config']['dataset']}, not --dataset {args.dataset}")
    for subnetwork in subnetworks.values():
        subnetwork["config"] |= {"sparse": args.sparse} if args.sparse else {}
    return subnetworks, *splits.load_real(dict(first["config"]), args.data_dir, device)


def fingerprint(subnetwork):
    """sha256 over the masks and the initial state of a mask file's dict."""
    digest = hashlib.sha256()
    for part in ("masks", "init"):
        for name, value in sorted(subnetwork[part].items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


#############################################
#                End points                 #
#############################################


def result_path(folder, mask_path, ending):
    """<folder>/<run>/<mask's name><ending>, where run is the mask's folder, or the two of .../<folder>/seed<S>/."""
    path = Path(mask_path).resolve()
    run_folders = path.parts[-3:-1] if path.parent.name.startswith("seed") else path.parts[-2:-1]
    return Path(folder, *run_folders, path.stem + ending)


def endpoint(folder, mask_path, subnetwork, split, order, epochs=None, seed=None, shared=0, overwrite=False):
    """A dict whose "state" is `subnetwork` (a mask file's dict) trained on `split` in the data order number `order`.

    Kept in result_path(folder, mask_path, "_order<order>.pt") and taken from there when the file is of the same
    mask, initial state, recipe and seed; if it is not: UserError, or trained anew with `overwrite`. An interrupted
    training goes on from its last save, at most an epoch and half a minute back. `epochs` and `seed` default to the
    mask file's. The first `shared` epochs are the same for all orders (Frankle et al. 2020): they are trained once,
    as order None, and kept in "_epoch<shared>.pt".
    """
    config = subnetwork["config"]
    recipe = common.recipe_of(config, epochs or config["eval_epochs"])
    seed = config["seed"] if seed is None else seed
    last, ending = (shared, f"_epoch{shared}.pt") if order is None else (recipe.epochs, f"_order{order}.pt")
    path = result_path(folder, mask_path, ending)
    identity = {"format": ENDPOINT_FORMAT, "mask_sha": fingerprint(subnetwork), "order": order, "seed": seed,
                "shared": shared, "images": len(split),
                **recipe._replace(sparse="auto")._asdict()}  # how zeros are skipped changes no more than rounding
    point = common.load(path, split.labels.device) if path.exists() else {}
    different = next((key for key in identity if point.get(key) != identity[key]), None)
    if point and different and not overwrite:
        change = f"{different} {point.get(different)}, not {identity[different]}"
        change = "another mask" if different == "mask_sha" else change
        raise UserError(f"{path} is an end point of {change}; --overwrite trains it anew, or choose another folder")
    if different:
        point = {"epochs_done": 0, "momenta": None, "state": subnetwork["init"]}
        if shared and order is not None:
            point = endpoint(folder, mask_path, subnetwork, split, None, epochs, seed, shared, overwrite)
            del point["generator"]
    if point["epochs_done"] < last:
        about = identity | {key: subnetwork[key] for key in ("masks", "round", "sparsity", "config")}
        point = train_endpoint(path, point, last, about, split, recipe, random_stream(seed, "order", order))
    return point


def train_ahead(folder, subnetworks, split, orders, epochs=None, seed=None, shared=0, overwrite=False):
    """Under torchrun: train the end points of {path: mask file's dict} in all `orders`, each on one of the ranks.

    They are found when they are asked for; one process trains them only then.
    """
    if ranks.together.get().size == 1:
        return
    paths = {result_path(folder, path, ""): path for path in subnetworks}.values()  # two of one result are trained once
    length = epochs or next(iter(subnetworks.values()))["config"]["eval_epochs"]
    for path in ranks.share(paths, "epochs shared by the orders", shared) if shared else ():
        endpoint(folder, path, subnetworks[path], split, None, epochs, seed, shared, overwrite)
    for path, order in ranks.share(itertools.product(paths, range(orders)), "epochs of all end points", length):
        endpoint(folder, path, subnetworks[path], split, order, epochs, seed, shared, overwrite)


def train_endpoint(path, point, last, about, split, recipe, generator):
    """Train from `point` to epoch `last` and return the new point, saved to `path` now and then, and at the end."""
    model = common.build_network(about["config"]).to(split.labels.device)
    model.load_state_dict(point["state"])
    momenta, saved = point["momenta"], time.monotonic()
    if "generator" in point:
        generator.set_state(point["generator"].cpu())
    with tqdm(initial=point["epochs_done"], total=last, desc=path.stem, unit="epoch", disable=None, leave=False) as bar:
        for epoch in range(point["epochs_done"], last):
            trained = common.train(model, split, recipe, generator, about["masks"], (epoch, epoch + 1), momenta)
            momenta = trained.momenta
            bar.set_postfix(loss=f"{trained.loss:.3f}", accuracy=f"{trained.accuracy:.1%}", refresh=False)
            bar.update()
            ranks.together.get().step()
            if epoch + 1 == last or time.monotonic() - saved > 30:
                point = about | {"epochs_done": epoch + 1, "state": model.state_dict()}
                if epoch + 1 < recipe.epochs:
                    point |= {"momenta": momenta, "generator": generator.get_state()}
                common.save(path, point)
                saved = time.monotonic()
    return point
