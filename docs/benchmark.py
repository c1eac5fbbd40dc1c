"""Measure speed, and what generated digits, samplers, guidance and the recipe are worth.

    python docs/benchmark.py training    images a second, beside a textbook loop: minutes
    python docs/benchmark.py sampling    digits a second, beside the network alone: minutes
    python docs/benchmark.py samplers    distance and time of every sampler: hours on a CPU
    python docs/benchmark.py guidance    digits at several strengths of guidance: minutes
    python docs/benchmark.py floors      distances among real digits: seconds
    python docs/benchmark.py usefulness  a classifier trained on generated digits alone: an hour
    python docs/benchmark.py told_apart  a network that tells generated digits from real ones: hours
    python docs/benchmark.py recipe      digits without one choice of the recipe at a time: hours
    python docs/benchmark.py time        digits after so many epochs, and a textbook loop's: hours
"""
import dataclasses
import functools
import itertools
import math
import os
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

import train
from common import REPOSITORY, add_flag, bounded, has_bf16, make_parser, run_script
from generate import (CHUNK, DEFAULT_SAMPLER, SAMPLERS, clean_image_predictor, load_checkpoint,
                      sample)
from test import (classify, frechet_distance, latent_features, load_classifier, mnist_pixels,
                  pick_images, share_inside, spread_labels, train_classifier)

TRAINING_STEPS = 30  # timed together


# ---- speed ----
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
    """Return {name: rates a second} of tasks {name: (function, amount, unit)}; print medians.

    Tasks take turns, so that a slow moment hits them all; the first round warms up.
    """
    result = {name: [] for name in tasks}
    for number in range(1 + rounds):
        for name, (function, amount, _) in tasks.items():
            taken = seconds(function, device)
            if number > 0:
                result[name].append(amount / taken)
    for name, values in result.items():
        print(f"{name:24}{statistics.median(values):9.0f} {tasks[name][2]}/s  "
              f"({min(values):.0f} to {max(values):.0f})")
    return result


def ratio(these, those):
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def peak_memory(device):
    """Return the MiB that the process, or on a GPU its tensors, have taken at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def our_training(state, images, labels):
    """Take TRAINING_STEPS steps as train.py does, on the first batches of an epoch."""
    batches = train.epoch_batches(state.settings, 0, len(images), images.device)
    for batch in batches[:TRAINING_STEPS]:
        train.take_step(state, images[batch], labels[batch], total_steps=10**6)


def loaded_batches(batch_size):
    """Yield batches of images in [0, 1] and labels without end, as tutorials load them."""
    mnist = MNIST(REPOSITORY / "mnist", transform=ToTensor(), download=True)
    loader = DataLoader(mnist, batch_size, shuffle=True, num_workers=min(4, os.cpu_count()),
                        drop_last=True)
    while True:
        yield from loader


def kept_batches(images, labels, batch_size):
    """Yield the same from tensors that are on the device already."""
    while True:
        order = torch.randperm(len(images), device=images.device)
        for batch in order.split(batch_size)[:len(images) // batch_size]:
            yield images[batch] / 255, labels[batch]


def textbook_training(model, optimizer, batches, steps, device, bf16):
    """Take steps in the loop that tutorials show, in bfloat16 or float32: DDPM's loss, t uniform.

    batches: an endless generator of (images, labels). One label in ten is hidden, as is usual for
    guidance.
    """
    alphas_cumprod = train.cumulative_alphas(1000).to(device)
    for images, labels in itertools.islice(batches, steps):
        x_0, labels = images.to(device) * 2 - 1, labels.to(device)
        labels = labels.masked_fill(torch.rand(len(labels), device=device) < 0.1, train.NULL_LABEL)
        noise, t = torch.randn_like(x_0), torch.randint(1000, labels.shape, device=device)
        alpha_t, sigma_t = train.signal_and_noise(t, alphas_cumprod)
        x_t = train.forward_diffusion_sample(x_0, noise, alpha_t, sigma_t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(model(x_t, t, labels).float(), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def flops_of_an_image(state, images, labels):
    """Return the floating point operations of a training step, for each of its images."""
    with FlopCounterMode(display=False) as counter:
        train.training_step(state, images, labels)
    return counter.get_total_flops() / len(images)


def textbook_tasks(images, labels, batch_size):
    """Return {name: function} of textbook loops, in all types that the device computes in.

    On a GPU also with the images kept there: else the DataLoader decides how fast the loop is.
    """
    device, tasks = images.device, {}
    loaders = {"textbook": loaded_batches(batch_size)}
    if device.type == "cuda":
        loaders["textbook, kept"] = kept_batches(images, labels, batch_size)
    for loader, batches in loaders.items():
        for number_type in ("float32", "bfloat16") if has_bf16(device) else ("float32",):
            model = train.SimpleUnet().to(device)
            tasks[f"{loader} {number_type}"] = functools.partial(
                textbook_training, model, torch.optim.Adam(model.parameters(), 1e-3), batches,
                TRAINING_STEPS, device, number_type == "bfloat16")
    return tasks


def saving_time(state):
    """Return the seconds that the state takes to save, with a log of 1,000 epochs."""
    state.log = [dict(epoch=n, loss=1 / n, seconds=1.0) for n in range(1, 1001)]
    with tempfile.TemporaryDirectory() as folder:
        return statistics.median(seconds(lambda: train.save_state(state, Path(folder)),
                                         state.rng.device) for _ in range(7))


def training_speed(args, device):
    """Print images a second of training, beside textbook loops and a matrix product."""
    images, labels = train.load_mnist("train", device=device)
    state = train.State(train.Settings(batch_size=args.batch_size), device)
    flops = flops_of_an_image(state, images[:args.batch_size], labels[:args.batch_size])
    ours = functools.partial(our_training, state, images, labels)
    ours()
    memory = peak_memory(device)  # before the textbook loops add their own
    n = args.batch_size * TRAINING_STEPS
    textbooks = textbook_tasks(images, labels, args.batch_size)
    tasks = {name: (task, n, "images") for name, task in {"training": ours, **textbooks}.items()}
    side = 16384 if device.type == "cuda" else 2048  # enough for full speed
    matrix = torch.randn(side, side, device=device).to(
        torch.bfloat16 if has_bf16(device) else torch.float32)
    tasks["matrix product"] = lambda: matrix @ matrix, 2 * side**3 / 1e9, "GFLOP"
    measured = rates(tasks, device)
    for name in textbooks:
        print(f"training is {ratio(measured['training'], measured[name]):.2f} times as fast as "
              f"{name}")
    share = ratio(measured["training"], measured["matrix product"]) * flops / 1e9
    print(f"{flops / 1e6:.0f} MFLOP an image make {share:.0%} of the matrix product's; "
          f"peak memory {memory:.0f} MiB")
    saving = saving_time(state)
    print(f"saving the state takes {saving:.2f} s, every {train.SAVE_INTERVAL} s: "
          f"{saving / train.SAVE_INTERVAL:.1%}")


@torch.inference_mode()
def sampling_speed(args, device):
    """Print digits a second of the default sampler, and of the network alone, as often."""
    model, _ = load_checkpoint(args.checkpoint_path, device)
    digits = 10 * CHUNK
    steps = SAMPLERS[DEFAULT_SAMPLER].steps
    labels = torch.arange(digits) % 10
    predict_x_0 = clean_image_predictor(model, labels[:CHUNK].to(device), guidance=1)
    size, channels = model.config["image_size"], model.config["channels"]
    x_t = torch.randn(CHUNK, channels, size, size, device=device)

    def network():
        for i in range(digits // CHUNK * steps):
            predict_x_0(x_t, 80 * (i % steps), 0.5)

    measured = rates({"sampling": (lambda: sample(model, labels), digits, "digits"),
                      "network alone": (network, digits, "digits")}, device)
    print(f"sampling reaches {ratio(measured['sampling'], measured['network alone']):.0%} of the "
          f"network's rate; peak memory {peak_memory(device):.0f} MiB")


# ---- quality ----
@torch.inference_mode()
def make_judge(device, n_samples):
    """Return (labels (N,), function that tells what digits generated for them are worth).

    It returns accuracy, classifier FID, precision and recall.
    """
    classifier = load_classifier(device)
    images, true_labels = train.load_mnist("test", device=device)
    real, _ = classify(classifier, mnist_pixels(images))
    labels = spread_labels(true_labels, n_samples)

    @torch.inference_mode()
    def judge(digits):
        features, read = classify(classifier, mnist_pixels(digits.to(device)))
        return ((read == labels).double().mean().item(), frechet_distance(features, real),
                share_inside(features, real), share_inside(real, features))
    return labels, judge


def with_deviation(values, form):
    """Return the mean and, of several values, the standard deviation as text."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def sampler_table(args, device):
    """Print classifier FID and the seconds for 1,000 digits."""
    model, _ = load_checkpoint(args.checkpoint_path, device)
    labels, judge = make_judge(device, args.n_samples)
    sample(model, labels[:CHUNK])  # warm up

    def cell(sampler, steps):
        distances, times = [], []
        for seed in range(args.seeds):
            start = time.perf_counter()
            digits = sample(model, labels, sampler, steps, seed)[-1]
            times.append((time.perf_counter() - start) * 1000 / args.n_samples)
            distances.append(judge(digits)[1])
        return f"{with_deviation(distances, '.4f')}, {statistics.mean(times):.2f} s"

    print(f"classifier FID of {args.n_samples:,} digits, {args.seeds} seeds; seconds for 1,000\n")
    print(f"| sampler | {' | '.join(f'{steps} steps' for steps in args.steps)} |")
    print(f"|---{'|---' * len(args.steps)}|")
    for name in SAMPLERS:
        print(f"| {name} | {' | '.join(cell(name, steps) for steps in args.steps)} |", flush=True)


GUIDANCE = 0, 1, 1.25, 1.5, 2, 4


def guidance_table(args, device):
    """Print what digits are worth at several strengths of guidance."""
    model, _ = load_checkpoint(args.checkpoint_path, device)
    labels, judge = make_judge(device, args.n_samples)
    print(f"{args.n_samples:,} digits\n\n| guidance | accuracy | FID | precision | recall |"
          "\n|---|---|---|---|---|")
    for guidance in GUIDANCE:
        accuracy, distance, precision, recall = judge(sample(model, labels, guidance=guidance)[-1])
        print(f"| {guidance} | {accuracy:.2%} | {distance:.4f} | {precision:.3f} | {recall:.3f} |",
              flush=True)


@torch.inference_mode()
def floor_table(args, device):
    """Print the Frechet distances of 5,000 real digits from 5,000 test images."""
    model, _ = load_checkpoint(args.checkpoint_path, device)
    classifier = load_classifier(device)
    form = model.config["image_size"], model.config["channels"], device
    train_images, test_images = (train.load_mnist(part, *form)[0] for part in ("train", "test"))

    def features(images):
        return latent_features(model, images), classify(classifier, mnist_pixels(images))[0]

    judged = features(test_images[1::2])
    print("distance to 5,000 test images\n\n| | fid_latent | fid_classifier |\n|---|---|---|")
    for name, images in (("the other 5,000", test_images[::2]),
                         ("5,000 training images", train_images[:5000])):
        latent, read = map(frechet_distance, features(images), judged)
        print(f"| {name} | {latent:.4f} | {read:.4f} |")


def usefulness_table(args, device):
    """Print how many real test digits classifiers read that were trained on generated digits alone.

    And on as many real ones, with the same labels: the classification accuracy score (Ravuri,
    Vinyals 2019).
    """
    model, _ = load_checkpoint(args.checkpoint_path, device)
    images, labels = train.load_mnist("train", device=device)
    images, labels = images[:args.n_samples], labels[:args.n_samples]
    test_images, test_labels = train.load_mnist("test", device=device)
    print(f"trained on {len(images):,} digits; {args.seeds} seeds\n\n| | test digits read right |"
          "\n|---|---|")

    def score(images, seed):
        classifier = train_classifier(images, labels, seed)
        _, read = classify(classifier, mnist_pixels(test_images))
        return (read == test_labels).double().mean().item()

    seeds = range(args.seeds)
    real = [score(images, seed) for seed in seeds]
    print(f"| real | {with_deviation(real, '.2%')} |", flush=True)
    made = [score(sample(model, labels, seed=seed)[-1].to(device), seed) for seed in seeds]
    print(f"| generated | {with_deviation(made, '.2%')} |")


def told_apart(generated, real, seed):
    """Return the share of right answers of a network that is to tell (N, 1, 28, 28) uint8 apart.

    It is a Classifier of two classes, trained in float32 on 80 % of the images, asked on the rest.
    """
    images = torch.cat([generated, real])
    is_real = torch.arange(len(images), device=images.device) >= len(generated)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order.to(images.device).tensor_split([len(images) * 4 // 5])
    network = train_classifier(images[seen], is_real[seen].long(), seed, bf16=False)
    _, answers = classify(network, mnist_pixels(images[unseen]))
    return (answers == is_real[unseen]).double().mean().item()


def told_apart_table(args, device):
    """Print how often a network tells digits from real ones: as they are, and in black and white.

    The mark is of training images against test images. 50 % would be guessing.
    """
    model, _ = load_checkpoint(args.checkpoint_path, device)
    images, labels = train.load_mnist("train", device=device)
    real, real_labels = train.load_mnist("test", device=device)
    wanted = spread_labels(real_labels, 10_000)
    print(f"10,000 digits of each kind, a fifth of them to test; {args.seeds} seeds\n\n"
          "| | as they are | in black and white |\n|---|---|---|")

    def black_and_white(images):
        return (images > 127).byte() * 255

    def row(name, generate):
        grey, binary = [], []
        for seed in range(args.seeds):
            made = generate(seed)
            grey.append(told_apart(made, real, seed))
            binary.append(told_apart(black_and_white(made), black_and_white(real), seed))
        print(f"| {name} | {with_deviation(grey, '.1%')} | {with_deviation(binary, '.1%')} |",
              flush=True)

    row("training images", lambda seed: pick_images(images, labels, wanted))
    row(args.checkpoint_path.stem, lambda seed: sample(model, wanted, seed=seed)[-1].to(device))


def adamw_alone(state):
    """Give Muon's kernels to AdamW."""
    kernels = [kernel for stack in state.muon.stacks for kernel in stack]
    state.adamw.add_param_group(dict(params=kernels))
    state.muon.stacks, state.muon.buffers, state.muon.streams = [], [], []


@torch.no_grad()
def labels_from_0(state):
    """Let the label embedding start from 0."""
    for model in (state.model, state.average):
        model.label_embedding.weight.zero_()


RECIPES = {  # other settings; what is done to the state; whether the rates fall
    "the recipe": ({}, None, True),
    "what is darker than black is an error, too": (dict(edge=math.inf), None, True),
    "no guidance in training": (dict(model_guidance=0.0), None, True),
    "no guidance in training, t nearly uniform, all as heavy (as DDPM)": (
        dict(model_guidance=0.0, t_mean=0.0, t_std=1.7, loss_power=0.0), None, True),
    "AdamW at 0.002 for all": (dict(adamw_rate=0.002), adamw_alone, True),
    "AdamW at 0.005 for all": (dict(adamw_rate=0.005), adamw_alone, True),
    "no average of the weights": (dict(ema_decay=0.0), None, True),
    "rates that do not fall": ({}, None, False),
    "a tenth of the labels hidden": (dict(label_dropout=0.1), None, True),
    "label embedding from 0": ({}, labels_from_0, True),
}


def train_variant(name, settings, images, labels):
    """Return the averaged network of a run of a variant of the recipe."""
    overrides, change, falling = RECIPES[name]
    state = train.State(dataclasses.replace(settings, **overrides), images.device)
    if change:
        change(state)
    steps = settings.n_epochs * (len(images) // settings.batch_size)
    for epoch in range(settings.n_epochs):
        for batch in train.epoch_batches(settings, epoch, len(images), images.device):
            train.take_step(state, images[batch], labels[batch], steps if falling else math.inf)
    return state.average


def train_textbook(settings, images, labels):
    """Return the network of a run of the textbook loop, without an average."""
    device = images.device
    torch.manual_seed(settings.seed)
    model = train.SimpleUnet().to(device, memory_format=torch.channels_last)
    steps = settings.n_epochs * (len(images) // settings.batch_size)
    textbook_training(model, torch.optim.Adam(model.parameters(), 1e-3),
                      kept_batches(images, labels, settings.batch_size), steps, device,
                      has_bf16(device))
    return model.eval().requires_grad_(False)


RUNS = [("textbook", epochs, 64) for epochs in (2, 4, 8, 16)] + [
    ("the recipe", 1, 64), ("the recipe", 2, 64), ("the recipe", 8, 64), ("the recipe", 16, 128)]


def time_table(args, device):
    """Print what digits are worth after more and more epochs, and how long these took."""
    wanted, judge = make_judge(device, args.n_samples)
    images, labels = train.load_mnist("train", device=device)
    print(f"{args.n_samples:,} digits, {args.seeds} seeds\n\n"
          "| | epochs | batch | seconds | accuracy | classifier FID |\n|---|---|---|---|---|---|")
    for name, n_epochs, batch_size in RUNS:
        judged, times = [], []
        for seed in range(args.seeds):
            settings = train.Settings(n_epochs=n_epochs, batch_size=batch_size, seed=seed)
            start = time.perf_counter()
            if name == "textbook":
                model = train_textbook(settings, images, labels)
            else:
                model = train_variant(name, settings, images, labels)
            next(model.parameters()).sum().item()  # a GPU has done its work then
            times.append(time.perf_counter() - start)
            judged.append(judge(sample(model, wanted, seed=seed)[-1]))
        accuracies, distances, *_ = zip(*judged, strict=True)
        print(f"| {name} | {n_epochs} | {batch_size} | {with_deviation(times, '.0f')} | "
              f"{with_deviation(accuracies, '.2%')} | {with_deviation(distances, '.4f')} |",
              flush=True)


def recipe_table(args, device):
    """Train with one choice at a time taken back; print what the digits are worth then."""
    wanted, judge = make_judge(device, args.n_samples)
    images, labels = train.load_mnist("train", device=device)
    print(f"{args.n_epochs} epochs, batch {args.batch_size}; {args.n_samples:,} digits, "
          f"{args.seeds} seeds\n\n| | accuracy | classifier FID |\n|---|---|---|")
    for name in RECIPES:
        judged = []
        for seed in range(args.seeds):
            settings = train.Settings(n_epochs=args.n_epochs, batch_size=args.batch_size, seed=seed)
            average = train_variant(name, settings, images, labels)
            judged.append(judge(sample(average, wanted, seed=seed)[-1]))
        accuracies, distances, *_ = zip(*judged, strict=True)
        print(f"| {name} | {with_deviation(accuracies, '.2%')} | "
              f"{with_deviation(distances, '.4f')} |", flush=True)


# ---- command line ----
TABLES = {"training": training_speed, "sampling": sampling_speed, "samplers": sampler_table,
          "guidance": guidance_table, "floors": floor_table, "usefulness": usefulness_table,
          "told_apart": told_apart_table, "recipe": recipe_table, "time": time_table}


def main(argv=None):
    parser = make_parser(__doc__)
    add = functools.partial(add_flag, parser)
    parser.add_argument("what", choices=TABLES)
    add("checkpoint_path", "to sample", REPOSITORY / "checkpoints/pretrained.pth", type=Path)
    add("batch_size", "images in a training step", 128, type=bounded(int, 1, 2000))
    add("n_epochs", "of each of the recipe's rows", 2, type=bounded(int, 1))
    add("steps", "the samplers' columns", [5, 12, 20, 50, 1000], type=bounded(int, 1), nargs="+")
    add("n_samples", "digits to judge", 10_000, type=bounded(int, 2000, 50_000))
    add("seeds", "repetitions", 3, type=bounded(int, 1, 100))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name = f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    TABLES[args.what](args, device)


if __name__ == "__main__":
    run_script(main)
