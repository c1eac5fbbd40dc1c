"""Train short runs, and write how good their digits are to docs/tables/runs.csv.

    python docs/runs.py           eight hours or so on two CPU cores with bfloat16
    python docs/runs.py trials    trials of other choices for the recipe: two hours

These are runs of the recipe, of ablations, which lack one of its choices, and of the baselines A to
E, each with several seeds. A run that the file has is not done again. So the file can grow over
several sittings, on several machines, and Ctrl-C loses no more than one run. Two processes can
share the work if each has seeds of its own. "python docs/benchmark.py baselines", "recipe" and
"trials" print the means. docs/tables/race.npz keeps ten digits of each run of baseline E and of the
recipe, to be drawn side by side.

Trials are trained on the first 50,000 training images and validated on the last 10,000. Their file
is docs/tables/trials.csv. So the test images judge new choices, but do not make them.
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import textbook
import train
from common import (REPOSITORY, UserError, add_device_flag, add_flag, bf16_is_faster, bounded,
                    prepare_folder, replacing, run_script, write_csv)
from generate import sample
from test import Judge, judging, load_classifier, spread_labels

RUNS_FILE = REPOSITORY / "docs/tables/runs.csv"
TRIALS_FILE = REPOSITORY / "docs/tables/trials.csv"
RACE_FILE = REPOSITORY / "docs/tables/race.npz"
N_SAMPLES = 10_000
BATCH_SIZE = 64
SEEDS = 3
EPOCHS = 1, 2, 4, 8, 16
RACERS = "E", "recipe"
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
                   f"{' and bfloat16' if bf16_is_faster(device) else ''}")
    return dict(commit=commit_of_src(), machine=machine, torch=torch.__version__,
                python=platform.python_version(), date=str(datetime.date.today()))


# ---- baselines ----
class Baseline(NamedTuple):
    """How a baseline differs from docs/textbook.py."""
    cosine: bool = False  # the noise is that of the cosine schedule, not of the linear one
    label_dropout: float = 0.1
    rate: float = 0.001
    decays: bool = False  # the learning rate decays linearly to 0 over the run
    guidance: float = 1.0  # classifier-free guidance scale, at sampling time


# B is the EMA of A; the others are judged by their EMA, too. E is guided at the scale to which the
# recipe's model guidance amounts (docs/how_it_works.md).
BASELINES = {"A": Baseline(),
             "C": Baseline(cosine=True, label_dropout=0.0),
             "D": Baseline(cosine=True, label_dropout=0.0, rate=0.002, decays=True),
             "E": Baseline(cosine=True, rate=0.002, decays=True,
                           guidance=1 / (1 - train.Settings.model_guidance))}


def predictor_by_noise(model, labels, guidance):
    """Return predict_x_0 as generate.clean_image_predictor does, for a network of a baseline.

    It predicts the noise. guidance acts where the recipe has model guidance.
    """
    nulls = torch.full_like(labels, train.NULL_LABEL)

    def predict(x_t, t, alpha_t, sigma_t, asked):
        eps = textbook.predict_noise(model, x_t, torch.full_like(asked, t), asked)
        return ((x_t - sigma_t * eps) / alpha_t).clamp(-1, 1)

    def predict_x_0(x_t, t, *coefficients):
        x_label = predict(x_t, t, *coefficients, labels)
        guided = train.Settings.guided_min <= t / textbook.T < train.Settings.guided_max
        if guidance == 1 or not guided:
            return x_label
        x_null = predict(x_t, t, *coefficients, nulls)
        return (x_null + guidance * (x_label - x_null)).clamp(-1, 1)
    return predict_x_0


def cosine_t():
    """Return t (1000,): our steps whose noise is nearest to that of the cosine schedule's steps.

    Nearest in the logarithm of the signal-to-noise ratio (Nichol, Dhariwal 2021, eq. 17). With each
    of these t drawn equally often, the network learns the noise of the cosine schedule, and our
    samplers can use it.
    """
    s = torch.arange(1001, dtype=torch.float64) / 1000
    f = ((s + 0.008) / 1.008 * math.pi / 2).cos().square()
    distances = (f[1:] / f[0]).logit()[:, None] - train.cumulative_alphas(1000).logit()
    return distances.abs().argmin(dim=1)


def follow_with_ema(model, optimizer, max_decay):
    """Return the EMA of the model, as train.py computes it, updated after the optimizer's steps."""
    ema = copy.deepcopy(model).requires_grad_(False)
    taken = itertools.count()

    def follow(*_):
        n = next(taken)
        train.update_ema(ema, model, torch.tensor(min(max_decay, (1 + n) / (10 + n))))

    optimizer.register_step_post_hook(follow)
    return ema


def decay_rate(optimizer, total_steps):
    """Let the optimizer's learning rate decay linearly to 0 over so many of its steps."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())


def train_baseline(name, settings, images, labels):
    """Yield {name: network} after each epoch of a baseline."""
    baseline, device = BASELINES[name], images.device
    torch.manual_seed(settings.seed)
    model = train.SimpleUnet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), baseline.rate)
    ema = follow_with_ema(model, optimizer, settings.ema_decay)
    if baseline.decays:
        decay_rate(optimizer, settings.n_epochs * (len(images) // settings.batch_size))
    all_t = cosine_t().to(device)

    def draw_t(batch_size, device):
        t = textbook.uniform_t(batch_size, device)
        return all_t[t] if baseline.cosine else t

    for _ in range(settings.n_epochs):
        textbook.train_epoch(model, optimizer, images, labels, settings.batch_size,
                             baseline.label_dropout, draw_t)
        yield {"A": model, "B": ema} if name == "A" else {name: ema}


# ---- the recipe and its ablations ----
def adam_alone(state):
    """Give Muon's kernels to Adam."""
    kernels = [kernel for stack in state.muon.stacks for kernel in stack]
    # They share the learning rate of Adam's other weights, the tensor that set_rates fills.
    state.adam.add_param_group(dict(params=kernels))
    state.muon.stacks, state.muon.buffers, state.muon.streams = [], [], []


class Ablation(NamedTuple):
    """What differs from the recipe."""
    label: str  # in tables
    settings: dict
    change: Callable | None = None  # of the State
    decays: bool = True  # the learning rates decay linearly to 0 over the run


ABLATIONS = {
    "recipe": Ablation("the recipe", {}),
    "no_muon": Ablation("Adam at 0.002 instead of Muon", dict(adam_rate=0.002), adam_alone),
    "no_guidance": Ablation("no model guidance", dict(model_guidance=0.0)),
    "uniform_t": Ablation("t nearly uniform", dict(t_mean=0.0, t_std=1.7)),
    "no_decay": Ablation("no learning rate decay", {}, decays=False),
    "no_clamp": Ablation("no clamp", dict(clamp=math.inf)),
}
LATER = dict(guided_min=0.24, guided_max=0.38)
TRIALS = {
    "noise_loss": Ablation("the squared error of the noise", dict(loss_power=2.0)),
    "v_loss": Ablation("the squared error of v", dict(loss_power=0.0)),
    "guided_later": Ablation("model guidance from 0.24 to 0.38", LATER),
    "guided_later_0.45": Ablation("model guidance of 0.45 from 0.24 to 0.38",
                                  dict(LATER, model_guidance=0.45)),
    "guided_longer_0.45": Ablation("model guidance of 0.45 from 0.19 to 0.38",
                                   dict(guided_max=0.38, model_guidance=0.45)),
    "t_mean_-0.5": Ablation("mean of logit(t / T) -0.5", dict(t_mean=-0.5)),
    "no_clipping": Ablation("no gradient clipping", dict(max_norm=math.inf)),
    "muon_0.015": Ablation("Muon at 0.015", dict(muon_rate=0.015)),
}


def train_ablation(name, settings, images, labels):
    """Yield {name: EMA of the network} after each epoch of an ablation, a trial or the recipe."""
    ablation = (ABLATIONS | TRIALS)[name]
    state = train.State(dataclasses.replace(settings, **ablation.settings), images.device)
    if ablation.change:
        ablation.change(state)
    steps = len(images) // settings.batch_size
    total_steps = settings.n_epochs * steps if ablation.decays else math.inf
    for epoch in range(settings.n_epochs):
        for batch in train.epoch_batches(settings, epoch, len(images), images.device):
            train.take_step(state, images[batch], labels[batch], total_steps)
        yield {name: state.ema}


# ---- runs ----
class Run(NamedTuple):
    """What is trained; its digits are judged after each of these epochs."""
    name: str
    epochs: tuple


# After a change here, take the rows of what has changed out of runs.csv.
#
# Where the learning rate is constant, one run passes through all epochs. Where it decays over a
# run, each number of epochs is a run of its own.
RUNS = [*(Run(name, (epochs,)) for epochs in EPOCHS for name in ("D", "E", "recipe")),
        *(Run(name, (2,)) for name in ABLATIONS if name != "recipe"), Run("no_guidance", (8,)),
        Run("A", EPOCHS[1:]), Run("C", EPOCHS[1:])]
TRIAL_RUNS = [*(Run(name, (2,)) for name in ("recipe", *TRIALS)),
              *(Run(name, (8,)) for name in ("recipe", "guided_longer_0.45"))]


def load_parts(device, trials=False):
    """Return ((images, labels), (images, labels)) to train on and to compare with."""
    images, labels = train.load_mnist("train", device=device)
    if not trials:
        return (images, labels), train.load_mnist("test", device=device)
    return (images[:50_000], labels[:50_000]), (images[50_000:], labels[50_000:])


@judging()
def make_scorer(device, n_samples, trials=False):
    """Return (labels (N,), score, real): score(digits) returns the metrics of digits for them.

    real: the metrics of as many training images.
    """
    judge = Judge(load_classifier(device), *load_parts(device, trials))
    labels = spread_labels(judge.test_labels, n_samples)

    @judging()
    def score(digits):
        return judge.scores(digits.to(device), labels)
    return labels, score, score(judge.real_digits(labels))


def networks(run, seed, images, labels):
    """Yield (epoch, {name: network}) after each epoch in run.epochs."""
    settings = train.Settings(n_epochs=run.epochs[-1], batch_size=BATCH_SIZE, seed=seed)
    train_one = train_baseline if run.name in BASELINES else train_ablation
    for epoch, trained in enumerate(train_one(run.name, settings, images, labels), start=1):
        if epoch in run.epochs:
            yield epoch, trained


def read_runs(path=RUNS_FILE):
    """Return the file's rows, dicts: metrics are floats, the rest texts. Without it: UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist: python docs/runs.py")
    with open(path) as file:
        return [row | {metric: float(row[metric]) for metric in METRICS}
                for row in csv.DictReader(file)]


def rows_of(rows, name, epoch):
    """Return the rows of these runs after this epoch, one for each seed."""
    return [row for row in rows if (row["training"], row["epochs"]) == (name, str(epoch))]


def new_row(training, scores, here, epochs="", seed=""):
    """Return a row of runs.csv; here: what conditions returns."""
    return dict(training=training, epochs=epochs, seed=seed,
                **{metric: scores[metric] for metric in METRICS}, **here)


def append_rows(path, rows):
    """Add rows to the file by one write, so that two processes can share it."""
    with open(path, "a") as file:  # its buffer holds all of them
        csv.DictWriter(file, rows[0].keys(), lineterminator="\n").writerows(rows)


def keep_for_race(name, epoch, digits):
    """Add a run's digits (10, 1, 28, 28) to docs/tables/race.npz."""
    kept = {}
    if RACE_FILE.exists():
        with np.load(RACE_FILE) as file:
            kept.update(file)
    kept[f"{name}_{epoch}"] = digits.numpy()
    with replacing(RACE_FILE) as file:
        np.savez_compressed(file, **kept)


def record_runs(path, runs, device, seeds, trials=False):
    """Do the runs that the file lacks, one seed after the other, and add their rows to it.

    Its first row is of training images. Raises UserError for a file of another commit of src.
    """
    here = conditions(device)  # asked now, for src may be edited while it runs
    if path.exists() and {row["commit"] for row in read_runs(path)} != {here["commit"]}:
        raise UserError(f"{path} is not of commit {here['commit']} of src: move it away")
    wanted, score, real = make_scorer(device, N_SAMPLES, trials)
    (images, labels), _ = load_parts(device, trials)
    if not path.exists():
        write_csv(path, [new_row("training images", real, here)])
    for seed, run in itertools.product(seeds, runs):
        done = rows_of(read_runs(path), run.name, run.epochs[-1])
        if str(seed) in [row["seed"] for row in done]:
            continue
        settings = {}  # of sample
        if run.name in BASELINES:
            settings = dict(predictor=predictor_by_noise, guidance=BASELINES[run.name].guidance)
        rows = []
        for epoch, trained in networks(run, seed, images, labels):
            for name, network in trained.items():
                digits = sample(network, wanted, seed=seed, **settings)[-1]
                rows.append(new_row(name, score(digits), here, epoch, seed))
                print(", ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
                if name in RACERS and (path, seed) == (RUNS_FILE, 0):
                    keep_for_race(name, epoch,
                                  sample(network, torch.arange(10), **settings)[-1])
        append_rows(path, rows)


# ---- command line ----
def main(argv=None):
    """Do the runs that docs/tables/runs.csv or trials.csv lacks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    add_device_flag(parser)
    add_flag(parser, "seeds", "of each run", [*range(SEEDS)], type=bounded(int, 0), nargs="+")
    parser.add_argument("what", nargs="?", choices=["runs", "trials"], default="runs")
    args = parser.parse_args(argv)
    prepare_folder(RUNS_FILE.parent)
    device = train.choose_device(args.device)
    if args.what == "trials":
        record_runs(TRIALS_FILE, TRIAL_RUNS, device, args.seeds, trials=True)
    else:
        record_runs(RUNS_FILE, RUNS, device, args.seeds)


if __name__ == "__main__":
    run_script(main)
