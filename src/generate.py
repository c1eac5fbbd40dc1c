"""Generate digits with trained checkpoints.

    python src/generate.py                                a grid of 16 digits for every checkpoint
    python src/generate.py --labels 0-9 --n_samples 100   ten columns, one for each digit

From top to bottom: the samplers, sampling in chunks, checkpoints, the grid, the command line.
"""
import argparse
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import pad
from torchvision.utils import make_grid
from tqdm import tqdm

from train import (NULL_LABEL, REPOSITORY, InputError, SimpleUnet, cumulative_alphas, epoch_checkpoints, generator,
                   has_bf16, make_folder, make_parser, replacing, run, whole_number)

CHUNK = 100  # images sampled together, always, so that image i depends on the seed and i alone


# ---- samplers ----
# One signature for all. eps(x_t, t) predicts the noise in x_t at the step t, an int; x_t is noise (B, C, H, W); levels
# is [(t, a, a_next)], each step's t and alphas_cumprod before and after it; rng draws fresh noise; clip keeps predicted
# images in [-1, 1]. They yield x_t after every step, the last one clean. Coefficients are floats, that is float64.

def noise_levels(time_steps, steps):
    """Return [(t, a, a_next)] for evenly spaced t, from T - 1, where x_t is noise, to a_next = 1: no noise is left."""
    alphas_cumprod = cumulative_alphas(time_steps).tolist()
    t = [round(time_steps * (steps - i) / steps) - 1 for i in range(steps)]
    a = [alphas_cumprod[i] for i in t]
    return list(zip(t, a, [*a[1:], 1.0], strict=True))


def predict_x_0(eps, x_t, t, a, clip):
    """Return the clean image that the predicted noise implies (DDPM, eq. 15)."""
    x_0 = (x_t - math.sqrt(1 - a) * eps(x_t, t)) / math.sqrt(a)
    return x_0.clamp(-1, 1) if clip else x_0


def draw_posterior(x_t, x_0, a, a_next, rng):
    """Draw x_next from q(x_next | x_t, x_0) (DDPM, eq. 6 and 7; the step may skip some t)."""
    beta = 1 - a / a_next
    mean = (math.sqrt(a_next) * beta * x_0 + math.sqrt(1 - beta) * (1 - a_next) * x_t) / (1 - a)
    variance = beta * (1 - a_next) / (1 - a)
    return mean + math.sqrt(variance) * torch.randn(x_t.shape, generator=rng, device=x_t.device)


def ddpm(eps, x_t, levels, rng, clip=True):
    """Ancestral sampling (Ho et al. 2020, algorithm 2)."""
    for t, a, a_next in levels:
        x_t = draw_posterior(x_t, predict_x_0(eps, x_t, t, a, clip), a, a_next, rng)
        yield x_t


def dpm(eps, x_t, levels, rng, clip=True):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): ancestral sampling of second order.

    The clean image is not taken as it is predicted at the step's start, but extrapolated from the last two predictions
    to the step's middle, linearly in lambda = log(alpha_t / sigma_t).
    """
    x_0_last = lambda_last = None
    for t, a, a_next in levels:
        x_0 = target = predict_x_0(eps, x_t, t, a, clip)
        lambda_t = math.log(a / (1 - a)) / 2
        if x_0_last is not None and a_next < 1:  # the last step is infinitely long in lambda: first order
            h = math.log(a_next / (1 - a_next)) / 2 - lambda_t
            target = x_0 + h / (2 * (lambda_t - lambda_last)) * (x_0 - x_0_last)
        x_t = draw_posterior(x_t, target, a, a_next, rng)
        x_0_last, lambda_last = x_0, lambda_t
        yield x_t


SAMPLERS = {"dpm": dpm, "ddpm": ddpm}


# ---- sampling ----
def noise_predictor(model, labels):
    """Return the function eps(x_t, t) that samplers ask for: the model's prediction for the labels (B,)."""
    def eps(x_t, t):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=has_bf16(x_t.device)):
            return model(x_t, torch.full_like(labels, t), labels).float()
    return eps


@torch.inference_mode()
def sample(model, labels, sampler="dpm", steps=None, seed=0):
    """Return images (N, C, H, W) uint8 for labels (N,) int64, 0..9 or NULL_LABEL. steps: 12 for dpm, T for ddpm.

    On one machine image i depends on the seed and on labels[i] alone. Raises InputError for more steps than T.
    """
    device, config = next(model.parameters()).device, model.config
    steps = steps or {"dpm": 12, "ddpm": config["time_steps"]}[sampler]
    if steps > config["time_steps"]:
        raise InputError(f"--steps: {steps} steps are more than the model's {config['time_steps']} time steps")
    levels = noise_levels(config["time_steps"], steps)
    chunks = labels.split(CHUNK)
    images = []
    with tqdm(total=len(chunks) * steps, unit=" steps", leave=False, disable=None) as bar:
        for number, chunk in enumerate(chunks):
            eps = noise_predictor(model, pad(chunk, (0, CHUNK - len(chunk))).to(device))
            rng = generator(device, seed, 2, number)
            shape = CHUNK, config["channels"], config["image_size"], config["image_size"]
            noise = torch.randn(shape, generator=rng, device=device)
            for x_t in SAMPLERS[sampler](eps, noise, levels, rng):
                bar.update()
            images.append(((x_t[:len(chunk)] + 1) * 127.5).round().clamp(0, 255).byte().cpu())
    return torch.cat(images)


def generate_samples(model, epoch=None, n_samples=16, checkpoint_path=None, save_dir="generated_samples",
                     labels=None, sampler="dpm", steps=None, seed=0):
    """Write a grid of digits to save_dir/generated_samples_{epoch}.png; return them, (n_samples, C, H, W) uint8.

    With checkpoint_path the model, of the same config, first takes the weights of that file, and epoch comes from it.
    labels: digits to cycle through, NULL_LABEL for any; by default drawn from the seed. steps: as in sample.
    """
    if checkpoint_path:
        loaded, checkpoint = load_checkpoint(checkpoint_path)
        if loaded.config != model.config:
            raise InputError(f"{checkpoint_path} is of {loaded.config}, the model of {model.config}")
        model.load_state_dict(checkpoint["model_state_dict"])
        epoch = checkpoint["epoch"]
    cycle = np.random.default_rng(seed).integers(10, size=n_samples) if labels is None else np.resize(labels, n_samples)
    images = sample(model, torch.from_numpy(cycle), sampler, steps, seed)
    columns = len(labels) if labels and len(labels) > 1 else math.ceil(math.sqrt(n_samples))
    name = "generated_samples.png" if epoch is None else f"generated_samples_{epoch}.png"
    save_grid(Path(save_dir) / name, images, columns)
    return images


def save_grid(path, images, columns):
    """Write images (N, C, H, W) uint8 row by row as one PNG; small grids are enlarged, each pixel to a square."""
    grid = make_grid(images, columns, padding=1)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    picture = ImageOps.scale(picture, max(1, 800 // max(picture.size)), Image.Resampling.NEAREST)
    with replacing(path) as file:
        picture.save(file, format="png")


# ---- checkpoints ----
def load_checkpoint(path, device="cpu"):
    """Return (model, checkpoint): the SimpleUnet that the file holds, for prediction only, and the file's dict.

    Raises OSError where the file cannot be read, InputError where it is damaged or not of this program.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = SimpleUnet(**checkpoint["config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        checkpoint["epoch"] = int(checkpoint["epoch"])
    except OSError:
        raise
    except Exception as error:  # torch.load meets damage with nearly any exception
        raise InputError(f"{path}: damaged, or not a checkpoint of this program") from error
    return model.to(device).eval().requires_grad_(False), checkpoint


def find_checkpoints(root, epochs, checkpoint_path=None):
    """Return the path given, or else those of root's checkpoints up to epochs, or else that of the released weights."""
    if checkpoint_path:
        return [checkpoint_path]
    found, folder = epoch_checkpoints(root), root / "checkpoints"
    pretrained = REPOSITORY / "checkpoints/pretrained.pth"
    if found and min(found) > epochs:
        raise InputError(f"--epochs {epochs}: the first checkpoint in {folder} is of epoch {min(found)}")
    if not found and not pretrained.exists():
        raise InputError(f"no checkpoint in {folder}: train one with 'python src/train.py'")
    if not found:
        print(f"no checkpoint in {folder}: using the released {pretrained}")
    return [path for epoch, path in found.items() if epoch <= epochs] or [pretrained]


def refuse_contradictions(args, path, config):
    """Raise InputError for a flag that was given and says otherwise than the config in the checkpoint."""
    for name, value in config.items():
        given = getattr(args, name, None)
        if given not in (None, value):
            raise InputError(f"--{name} {given} contradicts {path}, whose {name} is {value}")


# ---- command line ----
def parse_labels(text):
    """'7' -> [7], '0-9' -> [0, ..., 9], '3,1,4' -> [3, 1, 4], 'none' -> [NULL_LABEL]."""
    if text == "none":
        return [NULL_LABEL]
    labels = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d)(?:-(\d))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"must be digits like 7, 0-9 or 3,1,4, or none, not {text!r}")
        labels += range(int(match[1]), int(match[2] or match[1]) + 1)
    return labels


def add_checkpoint_flags(parser):
    """Add the flags that say which checkpoints to read."""
    parser.add_argument("--epochs", type=whole_number(1), default=1000, help="take the checkpoints up to this epoch")
    parser.add_argument("--checkpoint_path", type=Path, help="take this checkpoint alone")
    parser.add_argument("--channels", type=whole_number(1), help="refuse checkpoints of other channels")


def main(argv=None):
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--n_samples", type=whole_number(1, 100_000), default=16, help="digits in a grid")
    parser.add_argument("--labels", type=parse_labels, help="digits to cycle through, like 7, 0-9 or 3,1,4; "
                        "none: leave them to the model (default: drawn from the seed)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm", help="ddpm: the original one, slow; dpm: fast")
    parser.add_argument("--steps", type=whole_number(1), help="sampler steps (default: 12 for dpm, T for ddpm)")
    args = parser.parse_args(argv)
    save_dir = args.root / "generated_samples"
    make_folder(save_dir)
    for path in find_checkpoints(args.root, args.epochs, args.checkpoint_path):
        model, checkpoint = load_checkpoint(path, args.device)
        refuse_contradictions(args, path, model.config)
        generate_samples(model, checkpoint["epoch"], args.n_samples, None, save_dir, args.labels, args.sampler,
                         args.steps, args.seed)
        print(save_dir / f"generated_samples_{checkpoint['epoch']}.png")


if __name__ == "__main__":
    run(main)
