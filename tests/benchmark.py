"""Measure speed, and what the samplers are worth. Prints the README's tables.

    python tests/benchmark.py training   images per second, beside a textbook loop and a matrix product: a minute or two
    python tests/benchmark.py sampling   digits per second, beside the network's bare forward pass: a minute
    python tests/benchmark.py samplers   Frechet distance and time of every sampler: hours on a CPU, minutes on a GPU
    python tests/benchmark.py recipe     quality without one of the recipe's choices at a time: an hour on two cores
"""
import argparse
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import train
from common import REPOSITORY, bounded, generator, has_bf16, make_parser, run
from generate import CHUNK, SAMPLERS, load_checkpoint, noise_predictor, sample
from test import CLASSIFIER, classify, frechet_distance, load_classifier, mnist_pixels, spread_labels
from train import (SAVE_INTERVAL, SimpleUnet, forward_diffusion_sample, load_mnist, new_state, save_state,
                   training_loss, training_step)

TRAINING_STEPS = 30  # timed together


def seconds(function, device):
    """Return the time that function() takes, on a GPU by its own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def rates(tasks, device, rounds=7):
    """Return {name: rates a second} for tasks {name: (function, amount, unit)}, and print their medians and ranges.

    Tasks take turns, so that a slow moment hits them all; the first round warms up and does not count.
    """
    times = [[seconds(function, device) for function, _, _ in tasks.values()] for _ in range(1 + rounds)][1:]
    result = {}
    for (name, (_, amount, unit)), taken in zip(tasks.items(), zip(*times, strict=True), strict=True):
        result[name] = r = [amount / t for t in taken]
        print(f"{name:14} {statistics.median(r):8.0f} {unit}/s  ({min(r):.0f} to {max(r):.0f})")
    return result


def ratio(these, those):
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def peak_memory(device):
    """Return the bytes that the process, or on a GPU its tensors, have taken at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def our_training(state, images, labels, batch_size):
    """Return a function that trains for TRAINING_STEPS steps, as train.py does."""
    batches = torch.randperm(len(images), device=images.device).split(batch_size)[:TRAINING_STEPS]

    def steps():
        for batch in batches:
            training_step(state["model"], state, images[batch] / 127.5 - 1, labels[batch], 0, 10**6)
    return steps


def textbook_training(model, device, batch_size):
    """Return a function that trains for TRAINING_STEPS steps in the loop that tutorials show."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    mnist = MNIST(REPOSITORY / "mnist", transform=ToTensor())

    def batches():
        while True:
            yield from DataLoader(mnist, batch_size, shuffle=True, num_workers=4, drop_last=True)

    def train():
        for _, (images, labels) in zip(range(TRAINING_STEPS), endless, strict=False):
            x_0, labels = images.to(device) * 2 - 1, labels.to(device)
            noise, t = torch.randn_like(x_0), torch.randint(1000, labels.shape, device=device)
            eps = model(forward_diffusion_sample(x_0, t, noise, model.alphas_cumprod), t, labels)
            loss = F.mse_loss(eps, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    endless = batches()
    return train


def training_speed(args):
    """Print images a second of training, beside the textbook loop and the machine's fastest matrix product."""
    device, size = args.device, args.batch_size
    images, labels = load_mnist(True, device=device)
    settings = argparse.Namespace(n_epochs=1000, save_every=10, batch_size=size, image_size=28, channels=1,
                                  time_steps=1000, seed=0, device=device)
    state, textbook = new_state(settings), SimpleUnet().to(device)
    with FlopCounterMode(display=False) as counter:
        training_loss(textbook, textbook.alphas_cumprod, images[:size].float(), labels[:size],
                      generator(device, 0)).backward()
    ours = our_training(state, images, labels, size)
    ours()
    memory = peak_memory(device)  # before the textbook's loop adds its own
    side = 16384 if device.type == "cuda" else 2048  # enough for full speed
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if has_bf16(device) else torch.float32)
    n = size * TRAINING_STEPS
    r = rates({"training": (ours, n, "images"),
               "textbook loop": (textbook_training(textbook, device, size), n, "images"),
               "matrix product": (lambda: matrix @ matrix, 2 * side**3 / 1e9, "GFLOP")}, device)
    gflop = counter.get_total_flops() / size / 1e9
    print(f"training is {ratio(r['training'], r['textbook loop']):.1f} times the textbook loop's rate\n"
          f"{gflop * 1000:.0f} MFLOP an image, forwards and backwards, "
          f"make {ratio(r['training'], r['matrix product']) * gflop:.0%} of the matrix product's; "
          f"peak memory {memory / 2**20:.0f} MiB")
    state["log"] = [dict(epoch=n + 1, loss=1 / (n + 1)) for n in range(settings.n_epochs)]
    with tempfile.TemporaryDirectory() as folder:
        settings.root = Path(folder)
        saving = statistics.median(seconds(lambda: save_state(state, settings, []), device) for _ in range(7))
    print(f"saving the state takes {saving:.2f} s, every {SAVE_INTERVAL} s: {saving / SAVE_INTERVAL:.1%}")


@torch.inference_mode()
def sampling_speed(args):
    """Print the digits that the default sampler makes in a second, beside the limit: the network alone, as often."""
    model, _ = load_checkpoint(args.checkpoint_path, args.device)
    digits, steps = 10 * CHUNK, 10
    labels = torch.arange(digits) % 10
    eps = noise_predictor(model, labels[:CHUNK].to(args.device), guidance=1)
    size, channels = model.config["image_size"], model.config["channels"]
    x_t = torch.randn(CHUNK, channels, size, size, device=args.device)

    def network():
        for i in range(digits // CHUNK * steps):
            eps(x_t, 80 * (i % steps))

    r = rates({"sampling": (lambda: sample(model, labels, steps=steps), digits, "digits"),
               "network alone": (network, digits, "digits")}, args.device)
    print(f"sampling reaches {ratio(r['sampling'], r['network alone']):.0%} of the network's rate; "
          f"peak memory {peak_memory(args.device) / 2**20:.0f} MiB")


@torch.inference_mode()
def reference(args):
    """Return classifier, the test images' features (10000, 128), and the labels (N,) of the digits to generate."""
    classifier = load_classifier(CLASSIFIER, args.device)
    images, labels = load_mnist(False, device=args.device)
    return classifier, classify(classifier, mnist_pixels(images), 500)[0], spread_labels(labels, args.n_samples)


@torch.inference_mode()
def sampler_table(args):
    """Print classifier FID, with its standard deviation over seeds, and the seconds for 1,000 digits."""
    model, _ = load_checkpoint(args.checkpoint_path, args.device)
    classifier, real, labels = reference(args)
    sample(model, labels[:CHUNK])  # warm up

    def cell(sampler, steps):
        distances, times = [], []
        for seed in range(args.seeds):
            start = time.perf_counter()
            digits = sample(model, labels, sampler, steps, seed)[-1]
            times.append((time.perf_counter() - start) * 1000 / args.n_samples)
            features, _ = classify(classifier, mnist_pixels(digits.to(args.device)), 500)
            distances.append(frechet_distance(features, real))
        spread = f" ± {statistics.stdev(distances):.4f}" if args.seeds > 1 else ""
        return f"{statistics.mean(distances):.4f}{spread}, {statistics.mean(times):.2f} s"

    print(f"classifier FID of {args.n_samples:,} digits, {args.seeds} seeds; seconds for 1,000 digits\n\n"
          f"| sampler | {' | '.join(f'{steps} steps' for steps in args.steps)} |\n|---{'|---' * len(args.steps)}|")
    for sampler in args.samplers:
        print(f"| {sampler} | {' | '.join(cell(sampler, steps) for steps in args.steps)} |", flush=True)


class VUnet(train.SimpleUnet):
    """A U-Net whose layers make v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans & Ho 2022), from which eps follows."""

    def forward(self, x_t, t, labels):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt().to(x_t) * x_t + a.sqrt().to(x_t) * super().forward(x_t, t, labels)


class UnlabelledUnet(train.SimpleUnet):
    """A U-Net whose label embedding starts from 0."""

    def __init__(self, *form):
        super().__init__(*form)
        torch.nn.init.zeros_(self.label_embedding.weight)


def ddpm_loss(network, alphas_cumprod, x_0, labels, rng):
    """Return DDPM's loss: every t as often, every t the same weight."""
    t = torch.randint(len(alphas_cumprod), labels.shape, generator=rng, device=x_0.device)
    noise = torch.randn(x_0.shape, generator=rng, device=x_0.device)
    hidden = torch.rand(labels.shape, generator=rng, device=x_0.device) < train.LABEL_DROPOUT
    labels = labels.masked_fill(hidden, train.NULL_LABEL)
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=has_bf16(x_0.device)):
        eps = network(forward_diffusion_sample(x_0, t, noise, alphas_cumprod), t, labels)
    return F.mse_loss(eps, noise)


def adamw_alone(model):
    """Return two AdamW in place of Muon and AdamW."""
    muon, adamw = MAKE_OPTIMIZERS(model)
    return torch.optim.AdamW(muon.param_groups[0]["params"], betas=(0.9, 0.99), weight_decay=0, fused=True), adamw


MAKE_OPTIMIZERS, TRAINING_STEP = train.make_optimizers, train.training_step
RECIPES = {
    "the recipe": {"training_step": TRAINING_STEP},
    "every t as often and as heavy (DDPM's loss)": {"training_loss": ddpm_loss},
    "the layers make v, not eps": {"SimpleUnet": VUnet},
    "AdamW at 0.002 for all": {"make_optimizers": adamw_alone, "LEARNING_RATES": {"muon": 0.002, "adamw": 0.002}},
    "AdamW at 0.005 for all": {"make_optimizers": adamw_alone, "LEARNING_RATES": {"muon": 0.005, "adamw": 0.005}},
    "no average of the weights": {"get_ema_multi_avg_fn": lambda decay: get_ema_multi_avg_fn(0.0)},
    "a rate that does not fall": {"training_step": lambda *rest: TRAINING_STEP(*rest[:-1], float("inf"))},
    "a tenth of the labels hidden": {"LABEL_DROPOUT": 0.1},
    "label embedding from 0": {"SimpleUnet": UnlabelledUnet},
}


def recipe_table(args):
    """Train with one choice at a time taken back; print what the digits are worth then."""
    classifier, real, labels = reference(args)
    images, digits = load_mnist(True, device=args.device)
    form = argparse.Namespace(channels=1, image_size=28, time_steps=1000, seed=args.seed, device=args.device)
    steps = len(images) // args.batch_size
    print(f"{args.n_epochs} epochs, batch {args.batch_size}; {args.n_samples:,} digits\n\n"
          "| | accuracy | classifier FID |\n|---|---|---|")
    for name, changes in RECIPES.items():
        with mock.patch.multiple(train, **changes):
            state = train.new_state(form)
            for epoch in range(args.n_epochs):
                rng = generator(args.device, args.seed, 0, epoch)
                order = torch.randperm(len(images), generator=rng, device=args.device)
                for batch in order.split(args.batch_size)[:steps]:
                    train.training_step(state["model"], state, images[batch] / 127.5 - 1, digits[batch], args.seed,
                                        args.n_epochs * steps)
        with torch.inference_mode():
            made = sample(state["ema"], labels, seed=args.seed)[-1]
            features, read = classify(classifier, mnist_pixels(made.to(args.device)), 500)
        accuracy = (read == labels).double().mean().item()
        print(f"| {name} | {accuracy:.2%} | {frechet_distance(features, real):.4f} |", flush=True)


TABLES = {"training": training_speed, "sampling": sampling_speed, "samplers": sampler_table, "recipe": recipe_table}


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("--checkpoint_path", type=Path, default=REPOSITORY / "checkpoints/pretrained.pth")
    parser.add_argument("--batch_size", type=bounded(int, 1, 2000), default=128, help="images in a training step")
    parser.add_argument("--n_epochs", type=bounded(int, 1), default=5, help="for each row of the recipe's table")
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", default=list(SAMPLERS), help="rows of the table")
    parser.add_argument("--steps", type=bounded(int, 1), nargs="+", default=[5, 10, 20, 50, 1000], help="its columns")
    parser.add_argument("--n_samples", type=bounded(int, 2000, 50_000), default=10_000, help="digits for a distance")
    parser.add_argument("--seeds", type=bounded(int, 1, 100), default=3, help="repetitions of each")
    args = parser.parse_args(argv)
    print(hardware(args.device))
    TABLES[args.what](args)


if __name__ == "__main__":
    run(main)
