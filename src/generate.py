"""Generate digits with trained checkpoints.

    python src/generate.py                                a grid of 16 digits for every checkpoint
    python src/generate.py --labels 0-9 --n_samples 100   ten columns, one for each digit
    python src/generate.py --out digits.npz               arrays; .gif: an animation; a folder: single pictures

From top to bottom: the samplers, sampling in chunks, pictures and arrays, checkpoints, the command line.
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

from common import (REPOSITORY, InputError, bounded, epoch_checkpoints, generator, has_bf16, load_tensors, make_folder,
                    make_parser, refuse_contradictions, replacing, run)
from train import NULL_LABEL, SimpleUnet, cumulative_alphas

CHUNK = 100  # images sampled together, always, so that image i depends on the seed and i alone


# ---- samplers ----
# One signature for all. eps(x_t, t) predicts the noise in x_t at the step t, an int; x_t is noise (B, C, H, W); levels
# is [(t, a, a_next)], each step's t and alphas_cumprod before and after it; rng draws fresh noise, eta times as much as
# DDPM's; clip keeps predicted images in [-1, 1]. They yield x_t after every step, the last one clean. Coefficients are
# floats, that is float64.

def noise_levels(time_steps, steps):
    """Return [(t, a, a_next)] from t = T - 1, where x_t is noise, to a_next = 1: no noise is left.

    Steps grow shorter towards the clean image: t as (i / steps)^1.5, but never two at one t. T steps visit every t.
    """
    alphas_cumprod = cumulative_alphas(time_steps).tolist()
    t = [max(round(time_steps * (i / steps) ** 1.5), i) - 1 for i in range(steps, 0, -1)]
    a = [alphas_cumprod[i] for i in t]
    return list(zip(t, a, [*a[1:], 1.0], strict=True))


def predict_x_0(eps, x_t, t, a, clip):
    """Return the clean image that the predicted noise implies (DDPM, eq. 15)."""
    x_0 = (x_t - math.sqrt(1 - a) * eps(x_t, t)) / math.sqrt(a)
    return x_0.clamp(-1, 1) if clip else x_0


def draw_next(x_t, x_0, a, a_next, rng, eta):
    """Draw x_next from q(x_next | x_t, x_0) (DDIM, eq. 7 with the sigma of eq. 16; eta = 1: DDPM, eq. 6 and 7)."""
    sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    noise = (x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a)
    mean = math.sqrt(a_next) * x_0 + math.sqrt(1 - a_next - sigma**2) * noise
    return mean + sigma * torch.randn(x_t.shape, generator=rng, device=x_t.device)


def ddim(eps, x_t, levels, rng, clip=True, eta=0):
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12). eta = 0: an ODE's solver, without fresh noise."""
    for t, a, a_next in levels:
        x_t = draw_next(x_t, predict_x_0(eps, x_t, t, a, clip), a, a_next, rng, eta)
        yield x_t


def ddpm(eps, x_t, levels, rng, clip=True):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), also in fewer steps than T: DDIM's stochastic end."""
    return ddim(eps, x_t, levels, rng, clip, eta=1)


def dpm(eps, x_t, levels, rng, clip=True, eta=1):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order. eta = 1: its SDE variant; 0: no fresh noise.

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
        x_t = draw_next(x_t, target, a, a_next, rng, eta)
        x_0_last, lambda_last = x_0, lambda_t
        yield x_t


SAMPLERS = {"dpm": dpm, "ddim": ddim, "ddpm": ddpm}


# ---- sampling ----
def noise_predictor(model, labels, guidance):
    """Return the function eps(x_t, t) that samplers ask for: the model's prediction for the labels (B,).

    guidance: s in eps_null + s (eps_label - eps_null) (Ho, Salimans 2022); at 1 only the labels are asked for.
    """
    asked = labels if guidance == 1 else torch.cat([labels, torch.full_like(labels, NULL_LABEL)])

    def eps(x_t, t):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=has_bf16(x_t.device)):
            predicted = model(x_t.repeat(len(asked) // len(x_t), 1, 1, 1), torch.full_like(asked, t), asked).float()
        if guidance == 1:
            return predicted
        of_label, of_null = predicted.chunk(2)
        return of_null + guidance * (of_label - of_null)
    return eps


@torch.inference_mode()
def sample(model, labels, sampler="dpm", steps=None, seed=0, guidance=1, eta=None, n_frames=1):
    """Return images (F, N, C, H, W) uint8 for labels (N,) int64, 0..9 or NULL_LABEL: x_t at n_frames of the steps.

    They are spread evenly, the last is the clean image. steps: 10 for dpm, 50 for ddim, T for ddpm. eta: the sampler's
    own by default. On one machine image i depends on i, the seed, labels[i] and these settings alone.
    Raises InputError for more steps than T, and for an eta that the sampler does not take.
    """
    device, config = next(model.parameters()).device, model.config
    steps = steps or {"dpm": 10, "ddim": min(50, config["time_steps"]), "ddpm": config["time_steps"]}[sampler]
    if steps > config["time_steps"]:
        raise InputError(f"--steps: {steps} steps are more than the model's {config['time_steps']} time steps")
    if eta is not None and sampler == "ddpm":
        raise InputError("--eta is for the samplers dpm and ddim: ddpm's is 1")
    options = {} if eta is None else {"eta": eta}
    levels = noise_levels(config["time_steps"], steps)
    shown = {steps * (frame + 1) // n_frames for frame in range(n_frames)}
    chunks, images = labels.split(CHUNK), []
    with tqdm(total=len(chunks) * steps, unit=" steps", leave=False, disable=None) as bar:
        for number, chunk in enumerate(chunks):
            eps = noise_predictor(model, pad(chunk, (0, CHUNK - len(chunk))).to(device), guidance)
            rng = generator(device, seed, 2, number)
            shape = CHUNK, config["channels"], config["image_size"], config["image_size"]
            noise, frames = torch.randn(shape, generator=rng, device=device), []
            for step, x_t in enumerate(SAMPLERS[sampler](eps, noise, levels, rng, **options), 1):
                if step in shown:
                    frames.append(((x_t[:len(chunk)] + 1) * 127.5).round().clamp(0, 255).byte().cpu())
                bar.update()
            images.append(torch.stack(frames))
    return torch.cat(images, dim=1)


def generate_samples(model, epoch=None, n_samples=16, checkpoint_path=None, save_dir="generated_samples",
                     labels=None, seed=0, out=None, **settings):
    """Write digits to out, by default the grid save_dir/generated_samples_{epoch}.png; return them, (N, C, H, W) uint8.

    With checkpoint_path the model, of the same config, first takes the weights of that file, and epoch comes from it.
    labels: digits to cycle through, NULL_LABEL for any; by default drawn from the seed.
    settings: sampler, steps, guidance and eta, as in sample. The form of out: as in save.
    """
    if checkpoint_path:
        loaded, checkpoint = load_checkpoint(checkpoint_path)
        if loaded.config != model.config:
            raise InputError(f"{checkpoint_path} is of {loaded.config}, the model of {model.config}")
        model.load_state_dict(checkpoint["model_state_dict"])
        epoch = checkpoint["epoch"]
    out = Path(out or grid_path(save_dir, epoch))
    if out.suffix not in ("", ".png", ".npz", ".gif") or (out.suffix and out.is_dir()):
        raise InputError(f"--out {out}: must be a .png, .npz or .gif file, or a folder whose name has no suffix")
    make_folder(out.parent if out.suffix else out)
    if not out.suffix and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty")
    cycle = np.random.default_rng(seed).integers(10, size=n_samples) if labels is None else np.resize(labels, n_samples)
    frames = sample(model, torch.from_numpy(cycle), seed=seed, n_frames=24 if out.suffix == ".gif" else 1, **settings)
    one_digit = labels is None or len(labels) == 1
    save(out, frames, cycle, math.ceil(math.sqrt(n_samples)) if one_digit else len(labels))
    return frames[-1]


# ---- pictures and arrays ----
def grid_path(folder, epoch):
    """Return where the grid of an epoch's digits goes by default; epoch: a number or None."""
    return Path(folder) / f"generated_samples{'' if epoch is None else f'_{epoch}'}.png"


def draw_grid(images, columns):
    """Return images (N, C, H, W) uint8 row by row as one picture; small ones are enlarged, each pixel to a square."""
    grid = Image.fromarray(make_grid(images, columns, padding=1).permute(1, 2, 0).numpy())
    return ImageOps.scale(grid, max(1, 800 // max(grid.size)), Image.Resampling.NEAREST)


def save(path, frames, labels, columns):
    """Write images (F, N, C, H, W) uint8, the last frame clean, of labels (N,), in the form that path's suffix names.

    .png: the grid; .gif: its animation; .npz: arr_0, the images (N, H, W, C) uint8, and arr_1, the labels (N,) int64;
    none: a folder of single PNGs, named by index.
    """
    images = frames[-1].permute(0, 2, 3, 1).numpy()
    if not path.suffix:
        for number, image in enumerate(images):
            Image.fromarray(image.squeeze()).save(path / f"{number:05}.png")
        return
    with replacing(path) as file:
        if path.suffix == ".npz":
            np.savez_compressed(file, images, labels)
        elif path.suffix == ".png":
            draw_grid(frames[-1], columns).save(file, format="png")
        else:
            first, *others = [draw_grid(frame, columns).quantize(16) for frame in frames]
            first.save(file, format="gif", save_all=True, append_images=others, loop=0,
                       duration=[120] * len(others) + [3000])  # ms


# ---- checkpoints ----
def load_checkpoint(path, device="cpu"):
    """Return (model, checkpoint): the SimpleUnet that the file holds, for prediction only, and the file's dict.

    Raises OSError where the file cannot be read, InputError where it is damaged or not of this program.
    """
    try:
        checkpoint = load_tensors(path)
        model = SimpleUnet(**checkpoint["config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        checkpoint["epoch"] = int(checkpoint["epoch"])
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("not finite")
    except OSError:
        raise
    except Exception as error:
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
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--epochs", type=bounded(int, 1), default=1000, help="take the checkpoints up to this epoch")
    choice.add_argument("--checkpoint_path", type=Path, help="take this checkpoint alone")
    parser.add_argument("--channels", type=bounded(int, 1), help="refuse checkpoints of other channels")


def main(argv=None):
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--n_samples", type=bounded(int, 1, 100_000), default=16, help="digits to generate")
    parser.add_argument("--labels", type=parse_labels, help="digits to cycle through, like 7, 0-9 or 3,1,4; "
                        "none: leave them to the model (default: drawn from the seed)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm", help="dpm is the fast one, ddpm the original")
    parser.add_argument("--steps", type=bounded(int, 1), help="sampler steps (default: dpm 10, ddim 50, ddpm T)")
    parser.add_argument("--eta", type=bounded(float, 0, 1), help="fresh noise, 0 to 1 (default: dpm 1, ddim 0)")
    parser.add_argument("--guidance", type=bounded(float, 0, 100), default=1, help="pull towards the label; 1 is off")
    parser.add_argument("--out", type=Path, help="write the last checkpoint's digits here: .png grid, .gif its "
                        "animation, .npz arrays, or a folder (default: grids of all in generated_samples)")
    args = parser.parse_args(argv)
    paths = find_checkpoints(args.root, args.epochs, args.checkpoint_path)
    for path in paths[-1:] if args.out else paths:
        model, checkpoint = load_checkpoint(path, args.device)
        refuse_contradictions(args, path, model.config)
        out = args.out or grid_path(args.root / "generated_samples", checkpoint["epoch"])
        generate_samples(model, n_samples=args.n_samples, labels=args.labels, seed=args.seed, out=out,
                         sampler=args.sampler, steps=args.steps, guidance=args.guidance, eta=args.eta)
        print(f"epoch {checkpoint['epoch']}: {out}")


if __name__ == "__main__":
    run(main)
