"""What the scripts share beside the model: errors, devices and random numbers, files, flags."""
import argparse
import contextlib
import csv
import functools
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent  # MNIST and the released weights are found here


# ---- errors ----
class InputError(SystemExit):
    """Bad input from outside, a flag or a file: it ends a script with this one line on stderr."""


@contextlib.contextmanager
def reading(path, advice):
    """Raise InputError, naming the path and what to do, where the block cannot use its content."""
    try:
        yield
    except (Exception, InputError) as error:  # damaged and foreign files raise nearly anything
        raise InputError(f"{path} cannot be read ({type(error).__name__}): {advice}") from error


# ---- devices and random numbers ----
def has_bf16(device):
    """Whether the device computes in bfloat16. Most CPUs only emulate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(
        cpu.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


PURPOSES = ["order", "step", "samples", "evaluation"]


def seed_for(purpose, seed, *numbers):
    """Return a seed of 64 bits for one purpose: say, for step n of the run with this seed."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose), *numbers])
    return sequence.generate_state(1, np.uint64).item()


def generator(device, *key):
    """Return a torch.Generator whose draws depend on seed_for's key and the kind of device."""
    return torch.Generator(device).manual_seed(seed_for(*key))


# ---- files ----
@contextlib.contextmanager
def replacing(path, mode="wb"):
    """Open a file that takes path's place once it is whole: readers see the old one or the new.

    Raises InputError, with the old file as it was, where it cannot be written: on a full disk, say.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error}): make room, or choose "
                         "another place; what it held is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_tensors(path, content):
    """Write plain types and tensors, as torch.save does."""
    buffer = io.BytesIO()  # in memory first: torch.save itself does not say that a disk is full
    torch.save(content, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_tensors(path, device="cpu"):
    """Return what save_tensors wrote. Nothing in the file is executed; damage raises anything."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # the check sums, at which torch.load does not look
            raise ValueError("damaged")
    return torch.load(path, map_location=device, weights_only=True)


def write_csv(path, rows):
    """Write rows, dicts with the same keys, under a header of these keys."""
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def epoch_checkpoints(root):
    """Return {N: path} of the files checkpoints/diffusion_epoch_{N}.pth under root, by rising N."""
    found = root.glob("checkpoints/diffusion_epoch_*.pth")
    paths = {path.stem.removeprefix("diffusion_epoch_"): path for path in found}
    return {int(n): paths[n] for n in sorted(filter(str.isdecimal, paths), key=int)}


# ---- flags ----
def bounded(kind, minimum, maximum=10**9):
    """Return an argparse type: an int or a float, as kind says, from minimum to maximum."""
    def number(text):  # argparse calls what fails to convert an "invalid number value"
        value = kind(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be from {minimum} to {maximum}, not {text}")
        return value
    return number


def make_parser(description):
    """Return (parser, add): a parser with the flags that all scripts share, and its add_flag."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0],
                                     usage=argparse.SUPPRESS)  # errors take one line
    add = functools.partial(add_flag, parser)
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    add("root", "folder of checkpoints, generated_samples and datas", Path(), type=Path)
    add("device", "where to compute", devices[0], choices=devices)
    return parser, add


def add_flag(parser, name, text, default=None, **kind):
    """Add the flag --name. Its help is the text and, where there is one, the default."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(f"--{name}", help=text + shown, default=default, **kind)


def refuse_contradictions(args, config, path):
    """Raise InputError for a flag that says otherwise than the config in the file."""
    for name, value in config.items():
        given = getattr(args, name, None)
        if given not in (None, value):
            raise InputError(f"--{name} {given} contradicts {path}, whose {name} is {value}")
