"""Train short runs, and write what their digits are worth to docs/tables/runs.csv.

    python docs/runs.py    eight hours or so on two CPU cores, without bfloat16 thrice as many

These are runs by the recipe, by variants of it that lack one or a few of its choices, and by loops
as tutorials show them, each with several seeds. A run that the file has is not done again. So it
can grow over several sittings, on several machines, and Ctrl-C loses no more than one run. Two
processes can share the work if each has seeds of its own. "python docs/benchmark.py time" and
"python docs/benchmark.py recipe" print the means.
"""
import argparse
import copy
import csv
import dataclasses
import datetime
import itertools
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import train
from common import (REPOSITORY, InputError, add_device_flag, add_flag, bounded, has_bf16,
                    prepare_folder, run_script, write_csv)
from generate import sample, spread_labels
from test import judging, make_judge, pick_images

RUNS_FILE = REPOSITORY / "docs/tables/runs.csv"
N_SAMPLES = 10_000
SEEDS = 3
METRICS = "accuracy", "fid_classifier", "precision", "recall"


# ---- conditions ----
def git(*words):
    """Return what git prints: nothing, where it is not installed or there is no repository."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True,
                          text=True).stdout.strip()


def commit_of_src():
    """Return the last commit that touched src, and whether src has been changed since.

    Commits whose message says "No figure changes" are passed over: what src computes is the same.
    A shallow clone does not know.
    """
    if git("rev-parse", "--is-shallow-repository") == "true":
        return "unknown"
    changed = " (changed)" if git("status", "--porcelain", "--", "src") else ""
    last = git("log", "-1", "--format=%h", "--invert-grep", "--grep=No figure changes", "--", "src")
    return (last or "unknown") + changed


def conditions(device):
    """Return the commit, machine, versions and date of what this process measures, as texts."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        machine = (f"{threads} thread{'s' if threads > 1 else ''} of a CPU with "
                   f"{torch.backends.cpu.get_cpu_capability()}"
                   f"{' and bfloat16' if has_bf16(device) else ''}")
    return dict(commit=commit_of_src(), machine=machine, torch=torch.__version__,
                python=platform.python_version(), date=str(datetime.date.today()))


# ---- the loop that tutorials show ----
class Loop(NamedTuple):
    """What differs between the loops that tutorials show."""
    averaged: bool  # an average of the weights is judged
    cosine: bool  # the noise is that of the cosine schedule, not of the linear one
    hidden: float  # the share of labels that are hidden, as is usual for guidance
    rate: float = 0.001  # Adam's
    falls: bool = False  # the rate falls to 0 over the run


TEXTBOOK = Loop(averaged=False, cosine=False, hidden=0.1)
COSINE = Loop(averaged=True, cosine=True, hidden=0.0)
LOOPS = {"textbook": TEXTBOOK,
         "textbook, averaged": TEXTBOOK._replace(averaged=True),
         "textbook, averaged, cosine schedule, no label hidden": COSINE,
         "textbook, averaged, cosine schedule, no label hidden, a rate of 0.002 that falls":
             COSINE._replace(rate=0.002, falls=True)}


def cosine_t():
    """Return t (1000,): our steps whose noise is nearest to that of the cosine schedule's steps.

    That is, nearest in the logarithm of signal to noise (Nichol, Dhariwal 2021, eq. 17). If each of
    these t is drawn equally often, the network learns from the noise of the cosine schedule, and
    our samplers can use it.
    """
    s = torch.arange(1001, dtype=torch.float64) / 1000
    f = ((s + 0.008) / 1.008 * math.pi / 2).cos().square()
    distances = (f[1:] / f[0]).logit()[:, None] - train.cumulative_alphas(1000).logit()
    return distances.abs().argmin(dim=1)


def kept_batches(images, labels, batch_size):
    """Yield batches of images in [0, 1] and labels without end. No step waits for their loading."""
    while True:
        order = torch.randperm(len(images), device=images.device)
        for batch in order.split(batch_size)[:len(images) // batch_size]:
            yield images[batch] / 255, labels[batch]


def textbook_training(model, optimizer, batches, steps, device, bf16, loop=TEXTBOOK):
    """Take steps in the loop that tutorials show, in bfloat16 or float32: DDPM's loss, t uniform.

    batches: an endless generator of (images, labels).
    """
    alphas_cumprod = train.cumulative_alphas(1000).to(device)
    all_t = (cosine_t() if loop.cosine else torch.arange(1000)).to(device)
    for images, labels in itertools.islice(batches, steps):
        x_0, labels = images.to(device) * 2 - 1, labels.to(device)
        hidden = torch.rand(len(labels), device=device) < loop.hidden
        labels = labels.masked_fill(hidden, train.NULL_LABEL)
        noise = torch.randn_like(x_0)
        t = all_t[torch.randint(1000, labels.shape, device=device)]
        alpha_t, sigma_t = train.signal_and_noise(t, alphas_cumprod)
        x_t = train.forward_diffusion_sample(x_0, noise, alpha_t, sigma_t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(model(x_t, t, labels).float(), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # tutorials show it, so a GPU is waited for at every step


def keep_average(model, optimizer, max_decay):
    """Return a copy of the model that becomes the average of its weights, as train.py takes it.

    It is updated after each of the optimizer's steps.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    taken = itertools.count()

    def follow(*_):
        n = next(taken)
        train.update_average(average, model, torch.tensor(min(max_decay, (1 + n) / (10 + n))))

    optimizer.register_step_post_hook(follow)
    return average


def let_rate_fall(optimizer, total_steps):
    """Let the optimizer's rate fall to 0 in a straight line, over so many of its steps."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())


def train_textbook(settings, images, labels, loop=TEXTBOOK):
    """Yield the network after each epoch of a textbook loop, or the average of its weights.

    Images are kept on the device, and the network is laid out as ours is. So the time that it takes
    differs from ours by nothing but the steps.
    """
    device = images.device
    torch.manual_seed(settings.seed)
    model = train.SimpleUnet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), loop.rate)
    judged = keep_average(model, optimizer, settings.ema_decay) if loop.averaged else model
    batches = kept_batches(images, labels, settings.batch_size)
    steps = len(images) // settings.batch_size
    if loop.falls:
        let_rate_fall(optimizer, settings.n_epochs * steps)
    for _ in range(settings.n_epochs):
        textbook_training(model, optimizer, batches, steps, device, has_bf16(device), loop)
        yield judged


# ---- the recipe, and what is left when a choice is taken back ----
def adam_alone(state):
    """Give Muon's kernels to Adam."""
    kernels = [kernel for stack in state.muon.stacks for kernel in stack]
    # They share the rate of Adam's other weights, the tensor that set_rates fills.
    state.adam.add_param_group(dict(params=kernels))
    state.muon.stacks, state.muon.buffers, state.muon.streams = [], [], []


class Variant(NamedTuple):
    """What differs from the recipe: settings, what is done to the State, how soon the rates fall.

    The rates reach 0 after as many steps as the run has, times horizon.
    """
    settings: dict
    change: Callable | None = None
    horizon: float = 1


RECIPES = {
    "the recipe": Variant({}),
    "what is darker than black is an error, too": Variant(dict(edge=math.inf)),
    "no guidance in training": Variant(dict(model_guidance=0.0)),
    "no guidance in training, t nearly uniform": Variant(
        dict(model_guidance=0.0, t_mean=0.0, t_std=1.7)),
    "no guidance in training, t nearly uniform, all as heavy (as DDPM)": Variant(
        dict(model_guidance=0.0, t_mean=0.0, t_std=1.7, loss_power=0.0)),
    "all t as heavy": Variant(dict(loss_power=0.0)),
    "gradients of any length": Variant(dict(max_norm=math.inf)),
    "Adam at 0.001 for all": Variant(dict(adam_rate=0.001), adam_alone),
    "Adam at 0.002 for all": Variant(dict(adam_rate=0.002), adam_alone),
    "Adam at 0.005 for all": Variant(dict(adam_rate=0.005), adam_alone),
    "no average of the weights": Variant(dict(ema_decay=0.0)),
    "rates that do not fall": Variant({}, horizon=math.inf),
    "the first half of a run": Variant({}, horizon=2),
    "the first half of a run, no average of the weights": Variant(dict(ema_decay=0.0), horizon=2),
    "a tenth of the labels hidden": Variant(dict(label_dropout=0.1)),
}


def train_variant(name, settings, images, labels):
    """Yield the averaged network after each epoch of a variant of the recipe."""
    variant = RECIPES[name]
    state = train.State(dataclasses.replace(settings, **variant.settings), images.device)
    if variant.change:
        variant.change(state)
    total_steps = settings.n_epochs * (len(images) // settings.batch_size) * variant.horizon
    for epoch in range(settings.n_epochs):
        for batch in train.epoch_batches(settings, epoch, len(images), images.device):
            train.take_step(state, images[batch], labels[batch], total_steps)
        yield state.average


# ---- runs ----
class Run(NamedTuple):
    """What is trained, in batches of how many, and the epochs after which its digits are judged.

    A run ends with the last of these epochs.
    """
    name: str
    batch_size: int
    epochs: tuple


# After a change here, take the rows of what has changed out of runs.csv.
#
# Where the rate is constant, one run passes through all of a loop's rows. Where rates fall over a
# run, as the recipe's do, each row is a run of its own. The longest is in batches of 128, in which
# the released weights were trained.
OVER_TIME = [Run(name, 64, (2, 4, 8, 16)) for name, loop in LOOPS.items() if not loop.falls]
OVER_TIME += [Run(name, 64, (epochs,)) for name, loop in LOOPS.items() if loop.falls
              for epochs in (4, 8)]
OVER_TIME += [Run("the recipe", 64, (1,)), Run("the recipe", 64, (2,)), Run("the recipe", 64, (8,)),
              Run("the recipe", 128, (16,))]
OF_CHOICES = [Run(name, 64, (2,)) for name in RECIPES]
# What two epochs do not tell from chance, one epoch may: it leaves a run more to gain.
OF_CHOICES += [Run(name, 64, (1,)) for name in (
    "the recipe", "what is darker than black is an error, too", "no guidance in training",
    "all t as heavy", "gradients of any length")]
RUNS = list(dict.fromkeys(OVER_TIME + OF_CHOICES))  # some of the recipe's runs are in both


@judging()
def make_scorer(device, n_samples):
    """Return (labels (N,), score, mark): score(digits) returns the metrics of digits for them.

    mark: the metrics of as many training images.
    """
    judge = make_judge(28, 1, device)
    labels = spread_labels(judge.test_labels, n_samples)

    @judging()
    def score(digits):
        scores = judge.scores(judge.describe(digits.to(device)), labels)
        return {metric: scores[metric] for metric in METRICS}
    return labels, score, score(pick_images(judge.train_images, judge.train_labels, labels))


def networks(run, seed, images, labels):
    """Yield (epoch, network, seconds) after each epoch in run.epochs.

    seconds: of training so far, its start-up included.
    """
    settings = train.Settings(n_epochs=run.epochs[-1], batch_size=run.batch_size, seed=seed)
    if run.name in LOOPS:
        epochs = train_textbook(settings, images, labels, LOOPS[run.name])
    else:
        epochs = train_variant(run.name, settings, images, labels)
    seconds, start = 0.0, time.perf_counter()
    for epoch, network in enumerate(epochs, start=1):
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        if epoch in run.epochs:
            yield epoch, network, seconds
        start = time.perf_counter()


def read_runs(path=RUNS_FILE):
    """Return the file's rows, dicts: metrics are floats, the rest texts. Without it: InputError."""
    if not path.exists():
        raise InputError(f"{path} does not exist: python docs/runs.py")
    with open(path) as file:
        return [row | {metric: float(row[metric]) for metric in METRICS}
                for row in csv.DictReader(file)]


def rows_of(rows, run, epoch):
    """Return the rows of this run after this epoch, one for each seed."""
    wanted = run.name, str(run.batch_size), str(epoch)
    return [row for row in rows
            if (row["training"], row["batch_size"], row["epochs"]) == wanted]


def new_row(training, batch_size="", epochs="", seed="", seconds=""):
    return dict(training=training, batch_size=batch_size, epochs=epochs, seed=seed, seconds=seconds)


def record_runs(path, device, seeds):
    """Do the runs that the file lacks, one seed after the other, and add their rows to it.

    Its first row is of training images. Raises InputError for a file of another commit of src.
    """
    here = conditions(device)  # asked now, for src may be edited while it runs
    if path.exists() and {row["commit"] for row in read_runs(path)} != {here["commit"]}:
        raise InputError(f"{path} is not of commit {here['commit']} of src: move it away")
    wanted, score, mark = make_scorer(device, N_SAMPLES)
    images, labels = train.load_mnist("train", device=device)
    if not path.exists():
        write_csv(path, [new_row("training images") | mark | here])
    for seed, run in itertools.product(seeds, RUNS):
        if str(seed) in [row["seed"] for row in rows_of(read_runs(path), run, run.epochs[-1])]:
            continue
        rows = []
        for epoch, network, seconds in networks(run, seed, images, labels):
            row = new_row(run.name, run.batch_size, epoch, seed, f"{seconds:.1f}")
            rows.append(row | score(sample(network, wanted, seed=seed)[-1]) | here)
            print(", ".join(f"{name}: {value}" for name, value in rows[-1].items()), flush=True)
        write_csv(path, read_runs(path) + rows)  # read again: another run may have ended meanwhile


# ---- command line ----
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    add_device_flag(parser)
    add_flag(parser, "seeds", "of each run", [*range(SEEDS)], type=bounded(int, 0), nargs="+")
    args = parser.parse_args(argv)
    prepare_folder(RUNS_FILE.parent)
    record_runs(RUNS_FILE, train.start_processes(args.device), args.seeds)


if __name__ == "__main__":
    run_script(main)
