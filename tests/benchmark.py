"""Measure speed, and what the samplers are worth. Prints the README's tables.

    python tests/benchmark.py speed      digits per second, beside the network's bare forward pass: a minute
    python tests/benchmark.py samplers   Frechet distance and time of every sampler: hours on a CPU, minutes on a GPU
"""
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from generate import CHUNK, SAMPLERS, load_checkpoint, noise_predictor, sample
from test import CLASSIFIER, classify, frechet_distance, load_classifier, mnist_pixels, spread_labels
from train import REPOSITORY, bounded, load_mnist, make_parser, run


def seconds(function, device):
    """Return the time that function() takes, including what it leaves running on a GPU."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


@torch.inference_mode()
def sampling_speed(model, args, rounds=7):
    """Print the digits that the default sampler makes in a second, beside the limit: the network alone, as often."""
    digits, steps = 10 * CHUNK, 12
    labels = torch.arange(digits) % 10
    eps = noise_predictor(model, labels[:CHUNK].to(args.device), guidance=1)
    size, channels = model.config["image_size"], model.config["channels"]
    x_t = torch.randn(CHUNK, channels, size, size, device=args.device)

    def network():
        for i in range(digits // CHUNK * steps):
            eps(x_t, 80 * (i % steps))

    tasks = {"sample": lambda: sample(model, labels, steps=steps), "network": network}
    times = {name: [] for name in tasks}
    for i in range(rounds + 1):  # in turns, so that a slow moment hits both
        for name, task in tasks.items():
            taken = seconds(task, args.device)
            if i:  # the first round warms up
                times[name].append(taken)
    share = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    for name, taken in times.items():
        rates = [digits / t for t in taken]
        print(f"{name:8} {statistics.median(rates):8.0f} digits/s  ({min(rates):.0f} to {max(rates):.0f})")
    print(f"sampling reaches {share:.0%} of the network's rate")


@torch.inference_mode()
def sampler_table(model, args):
    """Print classifier FID, with its standard deviation over seeds, and the seconds for 1,000 digits."""
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
    parser.add_argument("what", choices=("speed", "samplers"))
    parser.add_argument("--checkpoint_path", type=Path, default=REPOSITORY / "checkpoints/pretrained.pth")
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", default=list(SAMPLERS), help="rows of the table")
    parser.add_argument("--steps", type=bounded(int, 1), nargs="+", default=[5, 10, 20, 50, 1000], help="its columns")
    parser.add_argument("--n_samples", type=bounded(int, 2000, 50_000), default=10_000, help="digits for a distance")
    parser.add_argument("--seeds", type=bounded(int, 1, 100), default=3, help="repetitions of each")
    args = parser.parse_args(argv)
    model, _ = load_checkpoint(args.checkpoint_path, args.device)
    print(hardware(args.device))
    {"speed": sampling_speed, "samplers": sampler_table}[args.what](model, args)


if __name__ == "__main__":
    run(main)
