"""What the scripts share besides the model: errors, random numbers, files, plots, flags."""
import argparse
import contextlib
import csv
import io
import os
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogLocator

REPOSITORY = Path(__file__).resolve().parent.parent  # MNIST and the released weights are found here


# ---- errors ----
class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, what to do."""


def run_script(main):
    """Call a script's main() and exit with the code that it returns.

    A UserError becomes one line on stderr and an exit code of 1.
    """
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))


@contextlib.contextmanager
def explain_read_errors(path, advice):
    """Turn any error in the block into a UserError that names the path and what to do.

    A damaged file can raise nearly anything, so only what reads the file belongs in the block.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist: {advice}") from error
    except Exception as error:
        # the first sentence: in torch's next one it says how to execute a hostile file after all
        reason = textwrap.shorten(f"{type(error).__name__}: {error}".split(". ")[0], 200)
        raise UserError(f"{path} cannot be read ({reason}): {advice}") from error


@contextlib.contextmanager
def explain_write_errors(path):
    """Turn an OSError in the block, a full disk for example, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): free space, or choose "
                        "another path; existing files are intact") from error


# ---- devices and random numbers ----
def bf16_is_faster(device):
    """Return whether the device computes faster in bfloat16 than in float32.

    Most CPUs only emulate bfloat16. Intel's without AMX compute in it, but more slowly than in
    float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu.get_capabilities()
    is_intel = cpu.get("cpu_name", "").startswith("Intel")
    return cpu.get("amx_bf16" if is_intel else "avx512_bf16", False)


PURPOSES = ["order", "step", "samples", "evaluation"]  # each one's index enters its seeds


def seed_for(purpose, seed, *numbers):
    """Return a seed for one purpose: step n of the run with this seed, for example.

    Nothing depends on what was drawn before, so a resumed run draws what an uninterrupted one would
    have drawn. SeedSequence ignores trailing zeros: (purpose, seed) and (purpose, seed, 0) are the
    same key.
    """
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose), *numbers])
    return sequence.generate_state(1, np.uint64).item()


def generator(device, *key):
    """Return a torch.Generator on the device, seeded by seed_for(*key).

    A GPU draws other numbers than a CPU.
    """
    return torch.Generator(device).manual_seed(seed_for(*key))


# ---- files ----
def prepare_folder(folder):
    """Make the folder. Raises UserError where no file can be made in it.

    Called before the work, so that no result is lost because it cannot be written.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def replacing(path, mode="wb"):
    """Open a temporary file that replaces path once it is whole.

    A reader of path finds the old content or the new, never half of it. Raises UserError where path
    cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_tensors(path, content):
    """Write plain types and tensors, as torch.save does."""
    buffer = io.BytesIO()  # torch.save itself does not report a full disk
    torch.save(content, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_tensors(path):
    """Return the dict that save_tensors wrote, on the CPU. Nothing in the file is executed.

    Where the file is missing or damaged any error is raised: see explain_read_errors.
    """
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # torch.load would take a flipped bit for a weight
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_csv(path, rows):
    """Write rows, dicts with the same keys, under a header of these keys."""
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def epoch_checkpoints(root):
    """Return {N: path} of the files checkpoints/diffusion_epoch_{N}.pth under root, by rising N."""
    found = {}
    for path in root.glob("checkpoints/diffusion_epoch_*.pth"):
        epoch = path.stem.removeprefix("diffusion_epoch_")
        if epoch.isdecimal():
            found[int(epoch)] = path
    return dict(sorted(found.items()))


# ---- plots ----
def label_log_axis(axis, multiples=(1, 2, 5)):
    """Label a logarithmic axis of matplotlib's by plain numbers, at these multiples of 10^n."""
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


# ---- flags ----
def bounded(convert, minimum, maximum=10**9):
    """Return an argparse type: convert, int or float, refusing what is out of bounds."""
    def number(text):  # argparse names it in "invalid number value"
        value = convert(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be from {minimum} to {maximum}, not {text}")
        return value
    return number


def add_flag(parser, name, text, default=None, **options):
    """Add the flag --name. Its help is the text and, where there is one, the default."""
    if default is not None:
        text = f"{text} (default: {default})"
    parser.add_argument(f"--{name}", help=text, default=default, **options)


def add_device_flag(parser):
    """Add the flag --device: by default a GPU if there is one."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    add_flag(parser, "device", "where to compute", devices[0], choices=devices)


def make_parser(description):
    """Return a parser with the flags that all scripts have: --root and --device."""
    parser = argparse.ArgumentParser(
        description=description.split("\n")[0], allow_abbrev=False,
        usage=argparse.SUPPRESS)  # so that errors take one line
    add_flag(parser, "root", "folder of checkpoints, generated_samples and datas", Path(),
             type=Path)
    add_device_flag(parser)
    return parser


def refuse_contradictions(args, config, path):
    """Raise UserError for a flag that differs from the config of the file at path."""
    for name, value in config.items():
        given = getattr(args, name, None)
        if given not in (None, value):
            raise UserError(f"--{name} {given} contradicts {path}, which was made with --{name} "
                            f"{value}")
