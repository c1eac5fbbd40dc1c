"""Measure speed, and what the samplers are worth. Prints the README's tables.

    python tests/benchmark.py training   images per second, beside a textbook loop and a matrix product: a minute or two
    python tests/benchmark.py sampling   digits per second, beside the network's bare forward pass: a minute
    python tests/benchmark.py samplers   Frechet distance and time of every sampler: hours on a CPU, minutes on a GPU
"""
import argparse
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

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
    matrix = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if has_bf16(device) else torch.float32)
    n = size * TRAINING_STEPS
    r = rates({"training": (ours, n, "images"),
               "textbook loop": (textbook_training(textbook, device, size), n, "images"),
               "matrix product": (lambda: matrix @ matrix, 2 * 2048**3 / 1e9, "GFLOP")}, device)
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
def sampler_table(args):
    """Print classifier FID, with its standard deviation over seeds, and the seconds for 1,000 digits."""
    model, _ = load_checkpoint(args.checkpoint_path, args.device)
    classifier = load_classifier(CLASSIFIER, args.device)
    images, test_labels = load_mnist(False, device=args.device)
    real, _ = classify(classifier, mnist_pixels(images), 500)
    labels = spread_labels(test_labels, args.n_samples)

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


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=("training", "sampling", "samplers"))
    parser.add_argument("--checkpoint_path", type=Path, default=REPOSITORY / "checkpoints/pretrained.pth")
    parser.add_argument("--batch_size", type=bounded(int, 1, 2000), default=128, help="images in a training step")
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", default=list(SAMPLERS), help="rows of the table")
    parser.add_argument("--steps", type=bounded(int, 1), nargs="+", default=[5, 10, 20, 50, 1000], help="its columns")
    parser.add_argument("--n_samples", type=bounded(int, 2000, 50_000), default=10_000, help="digits for a distance")
    parser.add_argument("--seeds", type=bounded(int, 1, 100), default=3, help="repetitions of each")
    args = parser.parse_args(argv)
    print(hardware(args.device))
    {"training": training_speed, "sampling": sampling_speed, "samplers": sampler_table}[args.what](args)


if __name__ == "__main__":
    run(main)
