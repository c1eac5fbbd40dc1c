"""Generate digits with trained checkpoints.

    python src/generate.py                              a grid of 16 digits for every checkpoint
    python src/generate.py --labels 3 1 4               cycling through these labels
    python src/generate.py --out digits.npz             arrays; .gif: an animation

The samplers come first, then sampling in chunks, pictures and arrays, checkpoints.
"""
import itertools
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

from common import (REPOSITORY, UserError, add_flag, bf16_is_faster, bounded, epoch_checkpoints,
                    explain_read_errors, generator, load_tensors, make_parser, prepare_folder,
                    refuse_contradictions, replacing, run_script)
from train import LATEST, NULL_LABEL, SimpleUnet, cumulative_alphas, x_0_from_v


# ---- samplers ----
# A sampler function(predict_x_0, x_t, levels, rng, eta) starts from noise x_t (B, C, H, W), and
# yields x_t after every step, the last one clean. predict_x_0(x_t, t, alpha_t, sigma_t) returns the
# clean image; levels: what noise_levels returns; rng draws fresh noise, eta times as much as
# DDPM's. All coefficients are Python floats, of 64 bits.

def noise_levels(time_steps, steps):
    """Return the levels (t, alpha_t, sigma_t) that lead from noise to the clean image.

    There is one for each step, from t = T - 1 on, and a last one for the clean image: (-1, 1, 0).
    t falls as (i / steps)^1.5, so that steps grow shorter towards the clean image. No two steps
    share a t, and T steps visit every t.
    """
    alphas_cumprod = cumulative_alphas(time_steps).tolist()
    times = [max(round(time_steps * (i / steps) ** 1.5), i) - 1 for i in range(steps, 0, -1)]
    levels = [(t, math.sqrt(alphas_cumprod[t]), math.sqrt(1 - alphas_cumprod[t])) for t in times]
    return [*levels, (-1, 1.0, 0.0)]


def draw_next(x_t, x_0, level, next_level, rng, eta):
    """Draw x_next from q(x_next | x_t, x_0) (DDIM, eq. 7 and 16; eta = 1: DDPM, eq. 6 and 7)."""
    _, alpha_t, sigma_t = level
    _, alpha_next, sigma_next = next_level
    fresh = eta * sigma_next / sigma_t * math.sqrt(1 - (alpha_t / alpha_next) ** 2)
    kept = math.sqrt(sigma_next**2 - fresh**2)
    eps = (x_t - alpha_t * x_0) / sigma_t
    noise = torch.randn(x_t.shape, generator=rng, device=x_t.device)
    return alpha_next * x_0 + kept * eps + fresh * noise


def ddim(predict_x_0, x_t, levels, rng, eta):
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12).

    eta = 1, in all T steps: DDPM's ancestral sampling (Ho et al. 2020, algorithm 2).
    eta = 0: the solver of an ODE, without fresh noise.
    """
    for level, next_level in itertools.pairwise(levels):
        x_t = draw_next(x_t, predict_x_0(x_t, *level), level, next_level, rng, eta)
        yield x_t


def dpm(predict_x_0, x_t, levels, rng, eta):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), of second order; eta = 1: its SDE variant.

    The clean image is extrapolated from the last two predictions to the step's middle, linearly in
    lambda_t = log(alpha_t / sigma_t).
    """
    x_0_last = lambda_last = None
    for level, next_level in itertools.pairwise(levels):
        _, alpha_t, sigma_t = level
        _, alpha_next, sigma_next = next_level
        lambda_t = math.log(alpha_t / sigma_t)
        x_0 = extrapolated = predict_x_0(x_t, *level)
        if x_0_last is not None and sigma_next > 0:  # the last step is infinitely long in lambda
            h = math.log(alpha_next / sigma_next) - lambda_t
            extrapolated = x_0 + h / (2 * (lambda_t - lambda_last)) * (x_0 - x_0_last)
        x_t = draw_next(x_t, extrapolated, level, next_level, rng, eta)
        x_0_last, lambda_last = x_0, lambda_t
        yield x_t


class Sampler(NamedTuple):
    """A sampler function, its default number of steps and its eta."""
    function: Callable
    steps: int | None  # None: T
    eta: float


SAMPLERS = {"dpm": Sampler(dpm, 12, 1.0), "ddim": Sampler(ddim, 50, 0.0),
            "ddpm": Sampler(ddim, None, 1.0)}
DEFAULT_SAMPLER = "dpm"


# ---- sampling ----
CHUNK_SIZE = 100  # digits that are sampled together


def clean_image_predictor(model, labels, guidance):
    """Return the predict_x_0(x_t, t, alpha_t, sigma_t) that samplers ask for, for labels (B,).

    Predictions are clipped to [-1, 1]. guidance: s in x_null + s (x_label - x_null), of clipped
    images. Without clipping this would be classifier-free guidance of the noise by w = s - 1 (Ho,
    Salimans 2022). At 1 it is x_label, and x_null is not computed.
    """
    both_labels = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])

    def predict(x_t, t, alpha_t, sigma_t, asked):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16_is_faster(x_t.device)):
            v = model(x_t, torch.full_like(asked, t), asked).float()
        return x_0_from_v(v, x_t, alpha_t, sigma_t).clamp(-1, 1)

    def predict_x_0(x_t, *level):
        if guidance == 1:
            return predict(x_t, *level, labels)
        x_label, x_null = predict(x_t.repeat(2, 1, 1, 1), *level, both_labels).chunk(2)
        return (x_null + guidance * (x_label - x_null)).clamp(-1, 1)
    return predict_x_0


def to_pixels(x):
    """Return images in [-1, 1] as uint8; what lies beyond is clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


@torch.no_grad()
def sample(model, labels, sampler=DEFAULT_SAMPLER, steps=None, seed=0, guidance=1,
           n_frames=1, predictor=clean_image_predictor):
    """Return images (F, N, C, H, W) uint8 for labels (N,) int64, 0..9 or NULL_LABEL.

    The F = min(n_frames, steps) frames show x_t after evenly spaced steps, the last one the clean
    image. steps: by default the sampler's. On one machine image i depends on i, the seed, labels[i]
    and these settings alone: every chunk of digits has random numbers of its own, and the last
    chunk is filled up to the full size. predictor: for a model that does not predict v. Raises
    UserError for more steps than T.
    """
    device = next(model.parameters()).device
    config = model.config
    chosen = SAMPLERS[sampler]
    steps = steps or min(chosen.steps or config["time_steps"], config["time_steps"])
    if steps > config["time_steps"]:
        raise UserError(f"steps must be at most the model's {config['time_steps']} time steps, not "
                        f"{steps}")
    levels = noise_levels(config["time_steps"], steps)
    shown_steps = {steps * (frame + 1) // n_frames for frame in range(n_frames)}
    shape = CHUNK_SIZE, config["channels"], config["image_size"], config["image_size"]
    chunks = labels.split(CHUNK_SIZE)
    images = []
    with tqdm(total=len(chunks) * steps, unit=" steps", leave=False, disable=None) as bar:
        for number, chunk in enumerate(chunks):
            filled = pad(chunk, (0, CHUNK_SIZE - len(chunk))).to(device)
            predict_x_0 = predictor(model, filled, guidance)
            rng = generator(device, "samples", seed, number)
            noise = torch.randn(shape, generator=rng, device=device)
            frames = []
            sampling = chosen.function(predict_x_0, noise, levels, rng, chosen.eta)
            for step, x_t in enumerate(sampling, start=1):
                if step in shown_steps:
                    frames.append(to_pixels(x_t[:len(chunk)]).cpu())
                bar.update()
            images.append(torch.stack(frames))
    return torch.cat(images, dim=1)


def choose_labels(n_samples, labels=None, seed=0):
    """Return labels (N,) int64: those given, again and again, or digits that the seed draws."""
    if labels is None:
        return torch.from_numpy(np.random.default_rng(seed).integers(10, size=n_samples))
    return torch.from_numpy(np.resize(labels, n_samples)).long()


# ---- pictures and arrays ----
def draw_grid(images, columns):
    """Return images (N, C, H, W) uint8 row by row as one picture, small ones enlarged."""
    grid = Image.fromarray(make_grid(images, columns, padding=1).permute(1, 2, 0).numpy())
    return ImageOps.scale(grid, max(1, 800 // max(grid.size)), Image.Resampling.NEAREST)


def count_columns(n_samples, labels):
    """Return the number of columns of a grid: one for each label, else those of a square."""
    if labels is None or len(labels) < 2:
        return math.ceil(math.sqrt(n_samples))
    return len(labels)


def write_gif(path, pictures, durations):
    """Write an animation of PIL images. durations: how long each is shown, in ms."""
    first, *others = [picture.quantize(16) for picture in pictures]
    with replacing(path) as file:
        first.save(file, format="gif", save_all=True, append_images=others, loop=0,
                   duration=durations)


def write_npz(path, images, labels):
    """Write arr_0, images (N, H, W, C) uint8, and arr_1, the labels (N,) if all are digits."""
    known = [] if NULL_LABEL in labels else [labels.numpy()]
    with replacing(path) as file:
        np.savez_compressed(file, images.permute(0, 2, 3, 1).numpy(), *known)


# ---- checkpoints ----
def load_checkpoint(path, device="cpu"):
    """Return (model, checkpoint): the SimpleUnet in the file, for prediction, and the file's dict.

    Raises UserError where the file is missing, damaged or of an earlier version.
    """
    with explain_read_errors(path, "it must be a diffusion_epoch_{N}.pth that this src/train.py "
                             "has written"):
        checkpoint = load_tensors(path)
        config = dict(checkpoint["config"])
        if config.pop("predicts", None) != "v":
            raise ValueError("its network predicts the noise, as in earlier versions")
        model = SimpleUnet(**config)
        model.load_state_dict(checkpoint["model_state_dict"])
        checkpoint["epoch"] = int(checkpoint["epoch"])  # it becomes part of a file's name
    model.to(device, memory_format=torch.channels_last)
    return model.eval().requires_grad_(False), checkpoint


def find_checkpoints(root, epochs, checkpoint_path=None):
    """Return the path given, or else root's checkpoints up to epochs, or the released weights.

    Raises UserError where root has checkpoints, but of later epochs alone, or a run that has not
    written any yet.
    """
    if checkpoint_path:
        return [checkpoint_path]
    folder = root / "checkpoints"
    found = epoch_checkpoints(root)
    if not found and (root / LATEST).exists():
        raise UserError(f"{root / LATEST} is of a run without a checkpoint: continue it with "
                        "--resume --save_every 1, or choose another --root")
    if not found:
        pretrained = REPOSITORY / "checkpoints/pretrained.pth"
        print(f"no diffusion_epoch_{{N}}.pth in {folder}: using the released {pretrained}")
        return [pretrained]
    if min(found) > epochs:
        raise UserError(f"--epochs {epochs}: the first checkpoint in {folder} is of epoch "
                        f"{min(found)}")
    if max(found) > epochs:
        print(f"checkpoints after epoch {epochs} are left out: --epochs {max(found)} takes all",
              file=sys.stderr)
    return [path for epoch, path in found.items() if epoch <= epochs]


def grid_path(folder, epoch):
    """Return where the grid of an epoch's digits goes; epoch: a number or None."""
    return Path(folder) / f"generated_samples{'' if epoch is None else f'_{epoch}'}.png"


def generate_samples(model, epoch=None, n_samples=16, checkpoint_path=None,
                     save_dir="generated_samples", labels=None, seed=0, **settings):
    """Write the grid save_dir/generated_samples_{epoch}.png; return its images (N, C, H, W) uint8.

    With checkpoint_path the model and the epoch are that file's. labels: digits to cycle through,
    NULL_LABEL for any; by default drawn from the seed. settings: sample's sampler, steps and
    guidance. Raises UserError as sample does, and for a file that load_checkpoint cannot read or a
    place that cannot be written to.
    """
    if checkpoint_path:
        model, checkpoint = load_checkpoint(checkpoint_path, next(model.parameters()).device)
        epoch = checkpoint["epoch"]
    prepare_folder(Path(save_dir))
    images = sample(model, choose_labels(n_samples, labels, seed), seed=seed, **settings)[-1]
    with replacing(grid_path(save_dir, epoch)) as file:
        draw_grid(images, count_columns(n_samples, labels)).save(file, format="png")
    return images


# ---- command line ----
def add_checkpoint_flags(parser):
    """Add the flags that say which checkpoints to read."""
    group = parser.add_mutually_exclusive_group()
    add_flag(group, "epochs", "take the checkpoints up to this epoch", 1000, type=bounded(int, 1))
    add_flag(group, "checkpoint_path", "take this checkpoint alone", type=Path)
    add_flag(parser, "channels", "fail unless the checkpoint has this many channels", type=int)


def generation_parser():
    """Return the parser of this script's flags."""
    steps = ", ".join(f"{name} {sampler.steps or 'T'}" for name, sampler in SAMPLERS.items())
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    add_flag(parser, "n_samples", "digits to generate", 16, type=bounded(int, 1, 100_000))
    add_flag(parser, "labels",
             f"digits to cycle through; {NULL_LABEL}: any (default: drawn from the seed)",
             type=int, nargs="+", choices=range(NULL_LABEL + 1), metavar="DIGIT")
    add_flag(parser, "sampler", "dpm is the fast one, ddpm the original", DEFAULT_SAMPLER,
             choices=SAMPLERS)
    add_flag(parser, "steps", f"steps from noise to a digit (default: {steps})",
             type=bounded(int, 1))
    add_flag(parser, "guidance", "classifier-free guidance scale; 1: none is added, 0: no label", 1,
             type=bounded(float, 0, 100))
    add_flag(parser, "seed", "seed of all random numbers", 0, type=bounded(int, 0))
    add_flag(parser, "out", "write the last checkpoint's digits to this .npz, as arrays, or .gif, "
             "an animation, instead of a grid for every checkpoint", type=Path)
    return parser


def write_digits(path, model, n_samples, labels, seed, **settings):
    """Write digits to a .gif or .npz file; the arguments are those of generate_samples."""
    prepare_folder(path.parent)
    all_labels = choose_labels(n_samples, labels, seed)
    is_gif = path.suffix == ".gif"
    frames = sample(model, all_labels, seed=seed, n_frames=50 if is_gif else 1, **settings)
    if is_gif:
        columns = count_columns(n_samples, labels)
        write_gif(path, [draw_grid(images, columns) for images in frames],
                  [120] * (len(frames) - 1) + [3000])
    else:
        write_npz(path, frames[-1], all_labels)


def main(argv=None):
    """Draw a grid for every checkpoint, or write the last one's digits to the file --out."""
    args = generation_parser().parse_args(argv)
    if args.out and args.out.suffix not in (".gif", ".npz"):
        raise UserError(f"--out {args.out} must end in .gif or .npz")
    settings = {name: getattr(args, name) for name in
                ("n_samples", "labels", "seed", "sampler", "steps", "guidance")}
    folder = args.root / "generated_samples"
    paths = find_checkpoints(args.root, args.epochs, args.checkpoint_path)
    if args.out:
        paths = paths[-1:]
    for path in paths:
        model, checkpoint = load_checkpoint(path, args.device)
        refuse_contradictions(args, model.config, path)
        if args.out:
            write_digits(args.out, model, **settings)
        else:
            generate_samples(model, checkpoint["epoch"], save_dir=folder, **settings)
        print(f"epoch {checkpoint['epoch']}: {args.out or grid_path(folder, checkpoint['epoch'])}")


if __name__ == "__main__":
    run_script(main)
