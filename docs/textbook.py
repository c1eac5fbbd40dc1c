"""Plain DDPM (Ho et al. 2020): the network of src/train.py, trained to predict the noise.

    python docs/textbook.py    two epochs, then digits in generated_samples/textbook.png: minutes

The README explains diffusion with this file, and docs/runs.py measures it as baseline A.
"""
import functools
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from common import REPOSITORY, bf16_is_faster
from generate import draw_grid, to_pixels
from train import NULL_LABEL, SimpleUnet, load_mnist

T = 1000


@functools.cache
def alphas_cumprod(device):
    betas = torch.linspace(1e-4, 0.02, T, device=device)
    return (1 - betas).cumprod(0)


def alpha_and_sigma(t):
    """Return the coefficients of image and noise in x_t, (B, 1, 1, 1) each. t: (B,)."""
    a = alphas_cumprod(t.device)[t].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def predict_noise(model, x_t, t, labels):
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16_is_faster(x_t.device)):
        return model(x_t, t, labels).float()


def uniform_t(batch_size, device):
    return torch.randint(T, (batch_size,), device=device)


def training_loss(model, x_0, t, labels):
    """Return the squared error of the predicted noise (DDPM, eq. 14)."""
    alpha_t, sigma_t = alpha_and_sigma(t)
    noise = torch.randn_like(x_0)
    x_t = alpha_t * x_0 + sigma_t * noise
    return F.mse_loss(predict_noise(model, x_t, t, labels), noise)


def train_epoch(model, optimizer, images, labels, batch_size=64, label_dropout=0.1,
                draw_t=uniform_t):
    """Take a step for each batch of images (N, 1, 28, 28) uint8 and labels (N,)."""
    order = torch.randperm(len(images), device=images.device)
    for batch in order.split(batch_size)[:len(images) // batch_size]:
        x_0 = images[batch] / 127.5 - 1
        dropped = torch.rand(batch_size, device=images.device) < label_dropout
        t = draw_t(batch_size, images.device)
        loss = training_loss(model, x_0, t, labels[batch].masked_fill(dropped, NULL_LABEL))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sample(model, labels, steps=50):
    """Return digits in [-1, 1] for labels (N,), by DDIM (Song et al. 2021, eq. 12)."""
    x_t = torch.randn(len(labels), 1, 28, 28, device=labels.device)
    times = torch.linspace(T - 1, 0, steps + 1).long().to(labels.device)
    for t, t_next in itertools.pairwise(times[:, None].expand(-1, len(labels))):
        alpha_t, sigma_t = alpha_and_sigma(t)
        eps = predict_noise(model, x_t, t, labels)
        x_0 = ((x_t - sigma_t * eps) / alpha_t).clamp(-1, 1)
        eps = (x_t - alpha_t * x_0) / sigma_t  # the noise consistent with the clipped x_0
        alpha_next, sigma_next = alpha_and_sigma(t_next)
        x_t = alpha_next * x_0 + sigma_next * eps
    return x_0


if __name__ == "__main__":
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_mnist("train", device=device)
    model = SimpleUnet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for epoch in (1, 2):
        print(f"epoch {epoch} of 2", flush=True)
        train_epoch(model, optimizer, images, labels)
    digits = to_pixels(sample(model, torch.arange(100, device=device) % 10)).cpu()
    draw_grid(digits, 10).save(REPOSITORY / "generated_samples/textbook.png")
