"""Train another's MNIST diffusion model for a while, and write its digits for src/test.py --digits.

    git clone https://github.com/bot66/MNISTDiffusion runs/MNISTDiffusion
    git -C runs/MNISTDiffusion checkout c7ba8e0
    python docs/peers.py MNISTDiffusion runs/MNISTDiffusion --out runs/digits.npz
    python src/test.py --digits runs/digits.npz

docs/comparison.md has these commands for all peers.

Network, loss, optimizer and sampler are the clone's own, with its settings, but for the
predecessor's sampler, which fails. Only the loop around them is written here, because theirs end
after epochs, not after seconds. The run has about as many steps as fit into the seconds, by the
time that ten of them take, and a learning rate that falls over a run falls over these. Training is
in float32, as theirs is; sampling in bfloat16 where the device computes in it, or some would take
hours.
"""
import argparse
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmark import print_conditions
from common import (REPOSITORY, InputError, add_device_flag, add_flag, bounded, has_bf16,
                    prepare_folder, replacing, run_script)
from generate import CHUNK, draw_grid, spread_labels
from runs import conditions
from train import load_mnist

TRAINING_IMAGES = 60_000
N_SAMPLES = 2000  # the fewest digits that src/test.py scores


def load(path):
    """Return the module in the file of a clone, which may import its neighbours."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: is it the right clone?")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- peers ----
# Each function returns (step, sample) for a run of total_steps steps. step(images, labels) trains
# on a batch of images (B, 1, 28, 28) in [0, 1]; sample(labels) returns as many digits, in [0, 1].


def conditional_diffusion_mnist(folder, total_steps, device):
    """https://github.com/TeaPearce/Conditional_Diffusion_MNIST, script.py: train_mnist."""
    script = load(folder / "script.py")
    network = script.ContextUnet(in_channels=1, n_feat=128, n_classes=10)
    ddpm = script.DDPM(network, betas=(1e-4, 0.02), n_T=400, device=device).to(device)
    optimizer = torch.optim.Adam(ddpm.parameters(), lr=1e-4)
    steps_of_an_epoch = math.ceil(TRAINING_IMAGES / 256)
    epochs = math.ceil(total_steps / steps_of_an_epoch)
    taken = itertools.count()

    def step(images, labels):
        optimizer.param_groups[0]["lr"] = 1e-4 * (1 - next(taken) // steps_of_an_epoch / epochs)
        optimizer.zero_grad()
        ddpm(images, labels).backward()
        optimizer.step()

    forward = network.forward

    def sample(labels):
        ddpm.eval()

        # The sampler asks for digits from 0 to 9 in turn, first with labels and then without, and
        # multiplies what it gets without by guide_w. So half of the work would be for nothing.
        def labelled_half(x_t, _, t, mask):
            half = len(labels)
            return forward(x_t[:half], labels, t[:half], mask[:half]).repeat(2, 1, 1, 1)

        network.forward = labelled_half
        digits, _ = ddpm.sample(len(labels), (1, 28, 28), device, guide_w=0.0)
        return digits
    return step, sample


def mnist_diffusion(folder, total_steps, device):
    """https://github.com/bot66/MNISTDiffusion, train_mnist.py: main. It knows no labels."""
    model = load(folder / "model.py").MNISTDiffusion(
        timesteps=1000, image_size=28, in_channels=1, base_dim=64, dim_mults=[2, 4]).to(device)
    epochs = math.ceil(total_steps / math.ceil(TRAINING_IMAGES / 128))
    share = min(1.0, (1 - 0.995) * 128 * 10 / epochs)
    average = load(folder / "utils.py").ExponentialMovingAverage(model, 1 - share, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=total_steps, pct_start=0.25, anneal_strategy="cos")
    taken = itertools.count()

    def step(images, labels):
        images = images * 2 - 1
        noise = torch.randn_like(images)
        F.mse_loss(model(images, noise), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if next(taken) % 10 == 0:
            average.update_parameters(model)

    def sample(labels):
        average.eval()
        return average.module.sampling(len(labels), device=device)
    return step, sample


def min_rf(folder, total_steps, device):
    """https://github.com/cloneofsimo/minRF, rf.py: its main part, for MNIST.

    On a CPU it runs without the line "drop_ids = drop_ids.cuda()" of its dit.py.
    """
    network = load(folder / "dit.py").DiT_Llama(1, 32, dim=64, n_layers=6, n_heads=4,
                                                num_classes=10).to(device)
    flow = load(folder / "rf.py").RF(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)

    def step(images, labels):
        optimizer.zero_grad()
        loss, _ = flow.forward(F.pad(images, (2, 2, 2, 2)) * 2 - 1, labels)
        loss.backward()
        optimizer.step()

    def sample(labels):
        network.eval()
        noise = torch.randn(len(labels), 1, 32, 32, device=device)
        digits = flow.sample(noise, labels, torch.full_like(labels, 10))[-1]
        return digits[:, :, 2:-2, 2:-2] * 0.5 + 0.5
    return step, sample


def predecessor(folder, total_steps, device):
    """https://github.com/treeleaves30760/diffusion-mnist, src/train.py. It knows no labels.

    Its generate.py asks train.py for names that are not there. Its sampler, DDPM's with variances
    of beta, is written here instead.
    """
    script = load(folder / "src/train.py")
    model = script.SimpleUnet().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    betas = script.linear_beta_schedule(1000)
    alphas_cumprod = (1 - betas).cumprod(0)

    def step(images, labels):
        optimizer.zero_grad()
        t = torch.randint(1000, labels.shape, device=device)
        x_t, noise = script.forward_diffusion_sample(images, t, betas, alphas_cumprod)
        F.mse_loss(model(x_t, t), noise).backward()
        optimizer.step()

    def sample(labels):
        model.eval()
        x = torch.randn(len(labels), 1, 28, 28, device=device)
        for t in reversed(range(1000)):
            eps = model(x, torch.full_like(labels, t))
            beta, a = betas[t].item(), alphas_cumprod[t].item()
            x = (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(1 - beta)
            if t > 0:
                x += math.sqrt(beta) * torch.randn_like(x)
        return x
    return step, sample


class Peer(NamedTuple):
    """A peer's function, its batch size and whether its digits have labels."""
    build: Callable
    batch_size: int
    has_labels: bool


PEERS = {"Conditional_Diffusion_MNIST": Peer(conditional_diffusion_mnist, 256, True),
         "MNISTDiffusion": Peer(mnist_diffusion, 128, False),
         "minRF": Peer(min_rf, 256, True),
         "predecessor": Peer(predecessor, 256, False)}


# ---- training and sampling ----
def batches(batch_size, device):
    """Yield batches of images in [0, 1] and labels, epoch after epoch."""
    mnist = MNIST(REPOSITORY / "mnist", transform=ToTensor(), download=True)
    loader = DataLoader(mnist, batch_size, shuffle=True, num_workers=1)
    while True:
        for images, labels in loader:
            yield images.to(device), labels.to(device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fitting_steps(peer, folder, seconds, device, trial=10):
    """Return how many steps fit into the seconds, by the time that a few take after a warm-up."""
    step, _ = peer.build(folder, 1000, device)
    data = batches(peer.batch_size, device)
    step(*next(data))
    synchronize(device)
    start = time.perf_counter()
    for images, labels in itertools.islice(data, trial):
        step(images, labels)
    synchronize(device)
    return max(1, round(seconds / (time.perf_counter() - start) * trial))


def train_and_sample(peer, folder, seconds, device):
    """Return digits (N, 1, 28, 28) uint8 and their labels (N,); print what was done."""
    total_steps = fitting_steps(peer, folder, seconds, device)
    torch.manual_seed(0)
    step, sample = peer.build(folder, total_steps, device)
    start = time.perf_counter()
    data = batches(peer.batch_size, device)
    for images, labels in tqdm(itertools.islice(data, total_steps), total=total_steps,
                               desc="training"):
        step(images, labels)
    synchronize(device)
    print(f"{total_steps:,} steps of {peer.batch_size} images: "
          f"{total_steps * peer.batch_size / TRAINING_IMAGES:.1f} epochs in "
          f"{time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    labels = spread_labels(load_mnist("test", device=device)[1], N_SAMPLES)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
        digits = torch.cat([sample(chunk).float().cpu() for chunk in labels.split(CHUNK)])
    print(f"{N_SAMPLES:,} digits in {time.perf_counter() - start:.0f} s", flush=True)
    return (digits.clamp(0, 1) * 255).round().byte(), labels.cpu()


# ---- command line ----
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path, help="its clone")
    add_flag(parser, "seconds", "of training", 600, type=bounded(float, 0.001))
    add_flag(parser, "out", "an .npz file; a picture of a hundred digits goes beside it",
             Path("digits.npz"), type=Path)
    add_device_flag(parser)
    args = parser.parse_args(argv)
    if args.out.suffix != ".npz":
        raise InputError(f"--out {args.out} must end in .npz")
    if not args.folder.is_dir():
        raise InputError(f"{args.folder} does not exist: clone {args.peer} there")
    prepare_folder(args.out.parent)
    peer, device = PEERS[args.peer], torch.device(args.device)
    print_conditions([conditions(device)])
    digits, labels = train_and_sample(peer, args.folder.resolve(), args.seconds, device)
    known = [labels.numpy()] if peer.has_labels else []
    with replacing(args.out) as file:
        np.savez_compressed(file, digits[:, 0].numpy(), *known)
    hundred = digits[torch.arange(100) * N_SAMPLES // 100]
    with replacing(args.out.with_suffix(".png")) as file:
        draw_grid(hundred, 10).save(file, format="png")


if __name__ == "__main__":
    run_script(main)
