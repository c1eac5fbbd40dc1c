"""Print tables of docs/tables: speed, and how good generated digits are.

    python docs/benchmark.py training    images a second, beside baseline D: minutes
    python docs/benchmark.py sampling    digits a second: minutes
    python docs/benchmark.py floors      distances among real digits: a minute
    python docs/benchmark.py guidance    digits at several guidance scales: a quarter hour
    python docs/benchmark.py samplers    Fréchet distance of every sampler: half an hour
    python docs/benchmark.py told_apart  a network that tells generated digits from real ones: hours
    python docs/benchmark.py released    metrics of the released run
    python docs/benchmark.py baselines   digits of baselines and of the recipe, by epochs
    python docs/benchmark.py recipe      digits of ablations
    python docs/benchmark.py trials      digits of other choices for the recipe

The times are those of two CPU cores with bfloat16. The last four tables take a moment: they are
the means of what "make release" and docs/runs.py have measured. "make tables" prints all tables
into their files, "make docs/tables/NAME.md" prints one.
"""
import argparse
import csv
import functools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import train
from common import REPOSITORY, add_device_flag, run_script
from generate import CHUNK_SIZE, DEFAULT_SAMPLER, SAMPLERS, load_checkpoint, sample
from runs import (ABLATIONS, BATCH_SIZE, EPOCHS, METRICS, N_SAMPLES, RUNS_FILE, SEEDS, TRIALS,
                  TRIALS_FILE, conditions, make_scorer, read_runs, rows_of, train_ablation,
                  train_baseline)
from test import (FORMATS, classify, frechet_distance, judging, load_classifier, mnist_pixels,
                  pick_images, share, spread_labels, train_classifier)

RELEASED = REPOSITORY / "checkpoints/pretrained.pth"
TRAINING_STEPS = 30  # timed together


# ---- tables ----
def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(*names):
    print_row(*names)
    print("|---" * len(names) + "|", flush=True)


def print_conditions(rows):
    """Print the commits, machines, versions and dates of these rows."""
    commit, machine, torch_version, python, date = (
        " and ".join(sorted({row[name] for row in rows}))
        for name in ("commit", "machine", "torch", "python", "date"))
    print(f"Commit {commit} of src; {machine}; torch {torch_version}, Python {python}; {date}.")


def with_deviation(values, form):
    """Return the mean and, of several values, the standard deviation as text."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


QUALITY = "accuracy", "Fréchet distance", "precision", "recall"  # the columns


def quality_cells(scores):
    """Return the cells below QUALITY for the metrics of digits: a dict for each seed."""
    return [with_deviation([score[metric] for score in scores], FORMATS[metric])
            for metric in METRICS]


# ---- speed ----
def seconds(function, device):
    """Return the seconds that function() takes, until a GPU has done what it has launched."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    print_header("", "median", f"range of {rounds} rounds")
    for name, values in result.items():
        print_row(name, f"{statistics.median(values):,.0f} {tasks[name][2]}/s",
                  f"{min(values):,.0f} to {max(values):,.0f}")
    return result


def training_speed(device, batch_size=BATCH_SIZE):
    """Print images a second of training: the recipe beside baseline D."""
    n = batch_size * TRAINING_STEPS
    images, labels = (values[:n] for values in train.load_mnist("train", device=device))
    settings = train.Settings(batch_size=batch_size)
    # Each next() is an epoch of these few images.
    recipe = train_ablation("recipe", settings, images, labels)
    baseline = train_baseline("D", settings, images, labels)
    print(f"Batches of {batch_size}.\n")
    of_recipe, of_baseline = rates({
        "the recipe": (functools.partial(next, recipe), n, "images"),
        "baseline D": (functools.partial(next, baseline), n, "images"),
    }, device).values()
    ratio = statistics.median(a / b for a, b in zip(of_recipe, of_baseline, strict=True))
    print(f"\nMedian of the rounds' ratios: the recipe trains {ratio:.2f} times as fast as D.")


def sampling_speed(device, checkpoint_path=RELEASED):
    """Print digits a second of the default sampler."""
    model, _ = load_checkpoint(checkpoint_path, device)
    labels = torch.arange(10 * CHUNK_SIZE) % 10
    print(f"{len(labels):,} digits in {SAMPLERS[DEFAULT_SAMPLER].steps} steps, {CHUNK_SIZE} of "
          "them together.\n")
    rates({"sampling": (lambda: sample(model, labels), len(labels), "digits")}, device)


# ---- quality ----
@judging()
def floor_table(device):
    """Print the Fréchet distances of 5,000 real digits from 5,000 test images."""
    classifier = load_classifier(device)
    test_images, test_labels = train.load_mnist("test", device=device)
    order = test_labels.argsort(stable=True)  # so that both halves have as many of each digit
    half, other_half = order[1::2], order[::2]
    train_images = pick_images(*train.load_mnist("train", device=device), test_labels[half])

    def features(images):
        return classify(classifier, mnist_pixels(images))[0]

    print("All digits are in the same proportions.\n")
    print_header("to half of the test images", "Fréchet distance")
    for name, images in (("the other 5,000 test images", test_images[other_half]),
                         ("5,000 training images", train_images)):
        distance = frechet_distance(features(images), features(test_images[half]))
        print_row(name, f"{distance:.4f}")


GUIDANCE = 1, 1.5, 2, 4


def guidance_table(device, checkpoint_path=RELEASED, n_samples=N_SAMPLES, seeds=SEEDS):
    """Print how good digits are at several guidance scales."""
    model, _ = load_checkpoint(checkpoint_path, device)
    labels, score, real = make_scorer(device, n_samples)
    print(f"{n_samples:,} digits, {seeds} seeds.\n")
    print_header("guidance", *QUALITY)
    for guidance in GUIDANCE:
        print_row(guidance, *quality_cells([
            score(sample(model, labels, seed=seed, guidance=guidance)[-1])
            for seed in range(seeds)]))
    print_row("training images", *quality_cells([real]))


def sampler_table(device, checkpoint_path=RELEASED, n_samples=N_SAMPLES, seeds=SEEDS,
                  steps=(5, 12, 25)):
    """Print the Fréchet distance of every sampler's digits."""
    model, _ = load_checkpoint(checkpoint_path, device)
    labels, score, real = make_scorer(device, n_samples)

    def cell(sampler, n_steps):
        distances = [score(sample(model, labels, sampler, n_steps, seed)[-1])["fid_classifier"]
                     for seed in range(seeds)]
        return with_deviation(distances, ".4f")

    print(f"Fréchet distance of {n_samples:,} digits, {seeds} seeds. As many training images have "
          f"{real['fid_classifier']:.4f}.\n")
    print_header("sampler", *(f"{n_steps} steps" for n_steps in steps))
    for name in SAMPLERS:
        print_row(name, *(cell(name, n_steps) for n_steps in steps))


# ---- told apart ----
def told_apart(generated, real, seed):
    """Return the test accuracy of a binary classifier of generated against real images.

    Both are (N, 1, 28, 28) uint8. It is a Classifier that uses two of its ten classes, trained on
    80 % of the images and tested on the rest.
    """
    images = torch.cat([generated, real])
    is_real = torch.arange(len(images), device=images.device) >= len(generated)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order.to(images.device).tensor_split([len(images) * 4 // 5])
    network = train_classifier(images[seen], is_real[seen].long(), seed, epochs=5, exact=True)
    with judging():
        _, answers = classify(network, mnist_pixels(images[unseen]))
    return share(answers == is_real[unseen])


LOOKS = {"as they are": lambda images: images,
         "in black and white": lambda images: (images > 127).byte() * 255}


def told_apart_table(device, checkpoint_path=RELEASED, seeds=SEEDS):
    """Print how often a network tells digits from real ones, grey and in black and white.

    The first line is of training images against test images. 50 % would be guessing.
    """
    images, labels = train.load_mnist("train", device=device)
    real, real_labels = train.load_mnist("test", device=device)
    wanted = spread_labels(real_labels, len(real))

    def generated(model, seed):
        return sample(model, wanted, seed=seed)[-1].to(device)

    def of_a_short_run(name):
        def made(seed):
            settings = train.Settings(n_epochs=2, batch_size=BATCH_SIZE, seed=seed)
            *_, trained = train_ablation(name, settings, images, labels)
            return generated(trained[name], seed)
        return made

    released, _ = load_checkpoint(checkpoint_path, device)
    rows = {
        "training images": lambda seed: pick_images(images, labels, wanted),
        "two epochs of the recipe": of_a_short_run("recipe"),
        "the same without the clamp": of_a_short_run("no_clamp"),
        checkpoint_path.stem: functools.partial(generated, released),
    }
    print(f"{len(real):,} digits of a kind and as many test images, a fifth of them held out; "
          f"{seeds} seeds.\n")
    print_header("", *LOOKS)
    for name, make in rows.items():
        shares = {look: [] for look in LOOKS}
        for seed in range(seeds):
            made = make(seed)
            for look, see in LOOKS.items():
                shares[look].append(told_apart(see(made), see(real), seed))
        print_row(name, *(with_deviation(values, ".1%") for values in shares.values()))


# ---- the release and short runs ----
def released_table():
    """Print the metrics of the released run, from datas/released_metrics.csv."""
    with open(REPOSITORY / "datas/released_metrics.csv") as file:
        rows = list(csv.DictReader(file))
    n_samples, seeds = int(rows[-1]["n_samples"]), {row["seed"] for row in rows[1:]}
    print(f"{n_samples:,} digits in {SAMPLERS[DEFAULT_SAMPLER].steps} steps, {len(seeds)} seeds of "
          "sampling.\n")
    print_header("epochs", *QUALITY, "copies")
    for epoch in dict.fromkeys(row["epoch"] for row in rows):
        print_row(epoch, *(with_deviation([float(row[metric]) for row in rows
                                           if row["epoch"] == epoch], FORMATS[metric])
                           for metric in (*METRICS, "copies")))


COMPARED = {
    "A: plain DDPM": "A",
    "B: A with EMA": "B",
    "C: B with the cosine schedule, without label dropout": "C",
    "D: C with a learning rate of 0.002 that decays": "D",
    "E: D with label dropout, guided at sampling time": "E",
    "the recipe": "recipe",
    "the recipe without model guidance": "no_guidance",
}


def runs_table(names, epochs, path=RUNS_FILE):
    """Print the metrics of the runs {what: name} after these epochs, if the file has them."""
    real, *rows = read_runs(path)
    found = [(what, n, rows_of(rows, name, n)) for what, name in names.items() for n in epochs]
    print_conditions([row for *_, of_run in found for row in of_run])
    seeds = " or ".join(map(str, sorted({len(of_run) for *_, of_run in found if of_run})))
    print(f"Batches of {BATCH_SIZE}; {N_SAMPLES:,} digits of each run; {seeds} seeds; "
          f"docs/tables/{path.name} has all runs.\n")
    print_header("training", "epochs", *QUALITY)
    for what, n, of_run in found:
        if of_run:
            print_row(what, n, *quality_cells(of_run))
    print_row("real digits", "", *quality_cells([real]))


def baselines_table():
    """Print how good digits of the baselines and of the recipe are after more and more epochs."""
    runs_table(COMPARED, EPOCHS)


def recipe_table():
    """Print how good digits are without one choice of the recipe."""
    runs_table({ablation.label: name for name, ablation in ABLATIONS.items()}, [2])


def trials_table():
    """Print the trials of other choices for the recipe, validated on training images held out."""
    tried = {"recipe": ABLATIONS["recipe"]} | TRIALS
    runs_table({trial.label: name for name, trial in tried.items()}, (2, 8), TRIALS_FILE)


# ---- command line ----
MEASURED_NOW = {"training": training_speed, "sampling": sampling_speed, "floors": floor_table,
                "guidance": guidance_table, "samplers": sampler_table,
                "told_apart": told_apart_table}
OF_RUNS = {"released": released_table, "baselines": baselines_table, "recipe": recipe_table,
           "trials": trials_table}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("table", choices=[*MEASURED_NOW, *OF_RUNS])
    add_device_flag(parser)
    args = parser.parse_args(argv)
    if args.table in OF_RUNS:
        OF_RUNS[args.table]()
    else:
        device = train.choose_device(args.device)
        print_conditions([conditions(device)])
        MEASURED_NOW[args.table](device)


if __name__ == "__main__":
    run_script(main)
