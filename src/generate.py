"""Generate digits with trained checkpoints.

    python src/generate.py                              a grid of 16 digits for every checkpoint
    python src/generate.py --labels 3 1 4               these, again and again
    python src/generate.py --out digits.npz             arrays; .gif: an animation

The samplers come first, then sampling in chunks, pictures and arrays, checkpoints.
"""
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import pad
from torchvision.utils import make_grid
from tqdm import tqdm

from common import (REPOSITORY, InputError, add_flag, blaming, bounded, epoch_checkpoints,
                    generator, has_bf16, load_tensors, make_parser, prepare_folder,
                    refuse_contradictions, replacing, run_script)
from train import NULL_LABEL, SimpleUnet, cumulative_alphas, implied_x_0, load_mnist


# ---- samplers ----
def noise_levels(time_steps, steps):
    """Return [(t, a, a_next)]: each step's t and the alphas_cumprod before and after it.

    From t = T - 1, where x_t is noise, to a_next = 1: no noise is left. t falls as
    (i / steps)^1.5, so that steps grow shorter towards the clean image. No two steps share a t, and
    T steps visit every t.
    """
    alphas_cumprod = cumulative_alphas(time_steps).tolist()
    t = [max(round(time_steps * (i / steps) ** 1.5), i) - 1 for i in range(steps, 0, -1)]
    a = [alphas_cumprod[i] for i in t]
    return list(zip(t, a, [*a[1:], 1.0], strict=True))


def draw_next(x_t, x_0, a, a_next, rng, eta):
    """Draw x_next from q(x_next | x_t, x_0) (DDIM, eq. 7 and 16; eta = 1: DDPM, eq. 6 and 7)."""
    sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    noise = (x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a)
    mean = math.sqrt(a_next) * x_0 + math.sqrt(1 - a_next - sigma**2) * noise
    return mean + sigma * torch.randn(x_t.shape, generator=rng, device=x_t.device)


def ddim(predict_x_0, x_t, levels, rng, eta):
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12): a Sampler's function.

    eta = 1, in all T steps: DDPM's ancestral sampling (Ho et al. 2020, algorithm 2).
    eta = 0: the solver of an ODE, without fresh noise.
    """
    for t, a, a_next in levels:
        x_t = draw_next(x_t, predict_x_0(x_t, t, a), a, a_next, rng, eta)
        yield x_t


def dpm(predict_x_0, x_t, levels, rng, eta):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), of second order; eta = 1: its SDE variant.

    A Sampler's function. The clean image is not taken as predicted at the step's start, but
    extrapolated from the last two predictions to the step's middle, linearly in
    lambda = log(a / (1 - a)) / 2.
    """
    x_0_last = lambda_last = None
    for t, a, a_next in levels:
        x_0 = predict_x_0(x_t, t, a)
        lambda_t = math.log(a / (1 - a)) / 2
        target = x_0
        if x_0_last is not None and a_next < 1:  # the last step is infinitely long in lambda
            h = math.log(a_next / (1 - a_next)) / 2 - lambda_t
            target = x_0 + h / (2 * (lambda_t - lambda_last)) * (x_0 - x_0_last)
        x_t = draw_next(x_t, target, a, a_next, rng, eta)
        x_0_last, lambda_last = x_0, lambda_t
        yield x_t


class Sampler(NamedTuple):
    """A way from noise to digits: its function, and what it does if nothing else is asked for.

    function(predict_x_0, x_t, levels, rng, eta) yields x_t after every step, the last one clean.
    predict_x_0(x_t, t, a) returns the clean image for a step t, an int, and its alphas_cumprod;
    x_t: noise (B, C, H, W); levels: what noise_levels returns. rng draws fresh noise, eta times as
    much as DDPM's. All coefficients are Python's floats, of 64 bits.
    """
    function: Callable
    steps: int | None  # None: T
    eta: float


SAMPLERS = {"dpm": Sampler(dpm, 12, 1.0), "ddim": Sampler(ddim, 50, 0.0),
            "ddpm": Sampler(ddim, None, 1.0)}
DEFAULT_SAMPLER = "dpm"


# ---- sampling ----
CHUNK = 100  # digits that are sampled together


def clean_image_predictor(model, labels, guidance):
    """Return the predict_x_0(x_t, t, a) that samplers ask for: by the model, for labels (B,).

    Predictions are clipped to [-1, 1]. guidance: s in x_null + s (x_label - x_null), where both are
    clipped. Without clipping that would be guidance of the noise by w = s - 1 (Ho, Salimans 2022).
    At 1 it is x_label, and the network is not asked for x_null.
    """
    both_labels = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])

    def ask_model(x_t, t, a, asked):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=has_bf16(x_t.device)):
            eps = model(x_t, torch.full_like(asked, t), asked).float()
        return implied_x_0(eps, x_t, math.sqrt(a), math.sqrt(1 - a)).clamp(-1, 1)

    def predict_x_0(x_t, t, a):
        if guidance == 1:
            return ask_model(x_t, t, a, labels)
        x_label, x_null = ask_model(x_t.repeat(2, 1, 1, 1), t, a, both_labels).chunk(2)
        return (x_null + guidance * (x_label - x_null)).clamp(-1, 1)
    return predict_x_0


def to_pixels(x):
    """Return images in [-1, 1] as uint8; what lies beyond is clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def check_request(model, labels, sampler, steps, eta):
    """Raise InputError for labels, a sampler, steps or an eta that sample cannot follow."""
    if len(labels) == 0 or not 0 <= labels.min() <= labels.max() <= NULL_LABEL:
        raise InputError(f"labels must be at least one, each from 0 to {NULL_LABEL}")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler}")
    if steps is not None and not 1 <= steps <= model.config["time_steps"]:
        raise InputError(f"steps must be from 1 to the model's {model.config['time_steps']} time "
                         f"steps, not {steps}")
    if eta is not None and not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, not {eta}")


@torch.no_grad()
def sample(model, labels, sampler=DEFAULT_SAMPLER, steps=None, seed=0, guidance=1, eta=None,
           n_frames=1):
    """Return images (F, N, C, H, W) uint8 for labels (N,) int64, 0..9 or NULL_LABEL.

    The frames show x_t after n_frames steps, evenly spread, or after all if there are fewer; the
    last is the clean image. steps and eta are by default the sampler's. On one machine image i
    depends on i, the seed, labels[i] and these settings alone: every chunk of digits has random
    numbers of its own, and the last one is filled up to the full size. Raises InputError as
    check_request does.
    """
    check_request(model, labels, sampler, steps, eta)
    device, config = next(model.parameters()).device, model.config
    chosen = SAMPLERS[sampler]
    steps = steps or min(chosen.steps or config["time_steps"], config["time_steps"])
    eta = chosen.eta if eta is None else eta
    levels = noise_levels(config["time_steps"], steps)
    framed = {steps * (frame + 1) // n_frames for frame in range(n_frames)}
    shape = CHUNK, config["channels"], config["image_size"], config["image_size"]
    chunks = labels.split(CHUNK)
    images = []
    with tqdm(total=len(chunks) * steps, unit=" steps", leave=False, disable=None) as bar:
        for number, chunk in enumerate(chunks):
            filled = pad(chunk, (0, CHUNK - len(chunk))).to(device)
            predict_x_0 = clean_image_predictor(model, filled, guidance)
            rng = generator(device, "samples", seed, number)
            noise = torch.randn(shape, generator=rng, device=device)
            frames = []
            for step, x_t in enumerate(chosen.function(predict_x_0, noise, levels, rng, eta), 1):
                if step in framed:
                    frames.append(to_pixels(x_t[:len(chunk)]).cpu())
                bar.update()
            images.append(torch.stack(frames))
    return torch.cat(images, dim=1)


def choose_labels(n_samples, labels=None, seed=0):
    """Return labels (N,) int64: those given, again and again, or digits that the seed draws."""
    if labels is None or len(labels) == 0:
        return torch.from_numpy(np.random.default_rng(seed).integers(10, size=n_samples))
    return torch.from_numpy(np.resize(labels, n_samples)).long()


def spread_labels(labels, n_samples):
    """Return n_samples labels, in order, in the proportions of the labels given."""
    places = torch.arange(n_samples, device=labels.device) * len(labels) // n_samples
    return labels.sort().values[places]


# ---- pictures and arrays ----
def grid_path(folder, epoch):
    """Return where the grid of an epoch's digits goes by default; epoch: a number or None."""
    return Path(folder) / f"generated_samples{'' if epoch is None else f'_{epoch}'}.png"


def count_columns(n_samples, labels):
    """Return the grid's columns: one for each label, or those of a square if there are not two."""
    if labels is None or len(labels) < 2:
        return math.ceil(math.sqrt(n_samples))
    return len(labels)


def draw_grid(images, columns):
    """Return images (N, C, H, W) uint8 row by row as one picture, small ones enlarged."""
    grid = Image.fromarray(make_grid(images, columns, padding=1).permute(1, 2, 0).numpy())
    return ImageOps.scale(grid, max(1, 800 // max(grid.size)), Image.Resampling.NEAREST)


def write_digits(path, frames, labels, columns):
    """Write frames (F, N, C, H, W) uint8, the last one clean, in the form that path's suffix names.

    .png: the last frame's grid; .gif: the grids of all, resting at the last; .npz: arr_0, the last
    frame's images (N, H, W, C) uint8, and arr_1, the labels (N,) int64, if all of them are digits.
    """
    with replacing(path) as file:
        if path.suffix == ".png":
            draw_grid(frames[-1], columns).save(file, format="png")
        elif path.suffix == ".gif":
            first, *others = [draw_grid(images, columns).quantize(16) for images in frames]
            first.save(file, format="gif", save_all=True, append_images=others, loop=0,
                       duration=[120] * len(others) + [3000])  # ms
        else:
            known = [] if NULL_LABEL in labels else [labels.numpy()]
            np.savez_compressed(file, frames[-1].permute(0, 2, 3, 1).numpy(), *known)


# ---- checkpoints ----
def load_checkpoint(path, device="cpu"):
    """Return (model, checkpoint): the SimpleUnet in the file, for prediction, and the file's dict.

    Raises InputError where the file is missing, damaged or not of this program.
    """
    with blaming(path, "it must be a diffusion_epoch_{N}.pth of src/train.py"):
        checkpoint = load_tensors(path)
        model = SimpleUnet(**checkpoint["config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        checkpoint["epoch"] = int(checkpoint["epoch"])  # it becomes part of a file's name
    return model.to(device).eval().requires_grad_(False), checkpoint


def find_checkpoints(root, epochs, checkpoint_path=None):
    """Return the path given, or else root's checkpoints up to epochs, or the released weights.

    Raises InputError where root has checkpoints, but of later epochs alone.
    """
    if checkpoint_path:
        return [checkpoint_path]
    found, folder = epoch_checkpoints(root), root / "checkpoints"
    if not found:
        pretrained = REPOSITORY / "checkpoints/pretrained.pth"
        print(f"no checkpoint in {folder}: using the released {pretrained}")
        return [pretrained]
    if min(found) > epochs:
        raise InputError(f"--epochs {epochs}: the first checkpoint in {folder} is of epoch "
                         f"{min(found)}")
    if max(found) > epochs:
        print(f"checkpoints after epoch {epochs} are left out: --epochs {max(found)} takes all",
              file=sys.stderr)
    return [path for epoch, path in found.items() if epoch <= epochs]


def generate_samples(model, epoch=None, n_samples=16, checkpoint_path=None,
                     save_dir="generated_samples", labels=None, seed=0, **settings):
    """Write the grid save_dir/generated_samples_{epoch}.png; return its images (N, C, H, W) uint8.

    With checkpoint_path the model and the epoch are that file's. labels: digits to cycle through,
    NULL_LABEL for any; by default drawn from the seed. settings: sample's sampler, steps, guidance
    and eta. Raises InputError as sample does, and for a file that load_checkpoint cannot read or a
    place that cannot be written to.
    """
    if checkpoint_path:
        model, checkpoint = load_checkpoint(checkpoint_path, next(model.parameters()).device)
        epoch = checkpoint["epoch"]
    prepare_folder(Path(save_dir))
    chosen = choose_labels(n_samples, labels, seed)
    frames = sample(model, chosen, seed=seed, **settings)
    write_digits(grid_path(save_dir, epoch), frames, chosen, count_columns(n_samples, labels))
    return frames[-1]


# ---- command line ----
def add_checkpoint_flags(parser):
    """Add the flags that say which checkpoints to read."""
    group = parser.add_mutually_exclusive_group()
    add_flag(group, "epochs", "take the checkpoints up to this epoch", 1000, type=bounded(int, 1))
    add_flag(group, "checkpoint_path", "take this checkpoint alone", type=Path)
    add_flag(parser, "channels", "refuse checkpoints of other channels", type=int)


def generation_parser():
    steps = ", ".join(f"{name} {sampler.steps or 'T'}" for name, sampler in SAMPLERS.items())
    etas = ", ".join(f"{name} {sampler.eta:g}" for name, sampler in SAMPLERS.items())
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    add_flag(parser, "n_samples", "digits to generate", 16, type=bounded(int, 1, 100_000))
    group = parser.add_mutually_exclusive_group()
    add_flag(group, "labels",
             f"digits to cycle through; {NULL_LABEL}: any (default: drawn from the seed)",
             type=int, nargs="+", choices=range(NULL_LABEL + 1), metavar="DIGIT")
    group.add_argument("--proportions", action="store_true", help="digits in the proportions of "
                       "MNIST's test set, as src/test.py generates them")
    add_flag(parser, "sampler", "dpm is the fast one, ddpm the original", DEFAULT_SAMPLER,
             choices=SAMPLERS)
    add_flag(parser, "steps", f"steps from noise to a digit (default: {steps})",
             type=bounded(int, 1))
    add_flag(parser, "eta", f"fresh noise, as a share of DDPM's (default: {etas})",
             type=bounded(float, 0, 1))
    add_flag(parser, "guidance", "pull towards the label; 1: as trained", 1,
             type=bounded(float, 0, 100))
    add_flag(parser, "seed", "seed of all random numbers", 0, type=bounded(int, 0))
    add_flag(parser, "out", "where the last checkpoint's digits go: a grid (.png), its animation "
             "(.gif) or arrays (.npz); by default a grid of every checkpoint, in generated_samples",
             type=Path)
    return parser


def main(argv=None):
    """Generate as the flags say."""
    args = generation_parser().parse_args(argv)
    if args.out and args.out.suffix not in (".png", ".gif", ".npz"):
        raise InputError(f"--out {args.out} must end in .png, .gif or .npz")
    if args.proportions:
        labels = spread_labels(load_mnist("test")[1], args.n_samples)
    else:
        labels = choose_labels(args.n_samples, args.labels, args.seed)
    columns = count_columns(args.n_samples, args.labels)
    paths = find_checkpoints(args.root, args.epochs, args.checkpoint_path)
    for path in paths[-1:] if args.out else paths:
        model, checkpoint = load_checkpoint(path, args.device)
        refuse_contradictions(args, model.config, path)
        out = args.out or grid_path(args.root / "generated_samples", checkpoint["epoch"])
        rows = math.ceil(args.n_samples / columns)
        height = rows * (model.config["image_size"] + 1) + 1
        if out.suffix == ".gif" and height >= 2**16:
            raise InputError(f"--out {out}: {rows:,} rows are too high for a .gif; ask for fewer "
                             "digits, or for a .png")
        prepare_folder(out.parent)
        frames = sample(model, labels, args.sampler, args.steps, args.seed, args.guidance,
                        args.eta, n_frames=50 if out.suffix == ".gif" else 1)
        write_digits(out, frames, labels, columns)
        print(f"epoch {checkpoint['epoch']}: {out}")


if __name__ == "__main__":
    run_script(main)
