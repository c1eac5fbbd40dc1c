"""Draw the pages' pictures, from the released weights and the runs in docs/tables: a minute.

    python docs/figures.py

generated_samples/released.png and .gif: a hundred digits, and how ten emerge from noise;
docs/figures/: what happens along t, what guidance does, how digits become better in training, and a
race of the recipe with its strongest baseline. Plots have a second form for GitHub's dark pages.
"""
import io
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from matplotlib import style
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import train
from benchmark import GUIDANCE
from common import REPOSITORY, generator, label_log_axis, replacing, run_script
from generate import (DEFAULT_SAMPLER, SAMPLERS, clean_image_predictor, draw_grid, load_checkpoint,
                      noise_levels, sample, to_pixels, write_gif)
from runs import EPOCHS, RACE_FILE, RACERS, read_runs, rows_of

FOLDER = REPOSITORY / "docs/figures"
SAMPLES = REPOSITORY / "generated_samples"


def save_figure(name, draw, *arguments):
    """Write the Figure that draw(*arguments) returns as {name}.png and {name}_dark.png."""
    for suffix, theme in (("", "default"), ("_dark", "dark_background")):
        with style.context(theme), replacing(FOLDER / f"{name}{suffix}.png") as file:
            draw(*arguments).savefig(file, format="png", dpi=120, transparent=True,
                                     bbox_inches="tight")


# ---- digits ----
def digits_grid(model):
    """Write a hundred digits, ten of each: two columns for each digit."""
    digits = sample(model, torch.arange(100) % 10)[-1]
    grid = ImageOps.scale(draw_grid(digits, 20), 3, Image.Resampling.NEAREST)
    with replacing(SAMPLES / "released.png") as file:
        grid.save(file, format="png")


def way_from_noise(model, steps=36):
    """Write x_t above, and below it the clean image that is predicted from it, for ten digits."""
    chosen = SAMPLERS[DEFAULT_SAMPLER]
    predict_x_0 = clean_image_predictor(model, torch.arange(10), guidance=1)
    frames = []

    def show(x_t, x_0):
        frames.append(draw_grid(to_pixels(torch.cat([x_t, x_0])), 10))

    def predict_and_show(x_t, *level):
        x_0 = predict_x_0(x_t, *level)
        show(x_t, x_0)
        return x_0

    rng = generator("cpu", "samples", 0, 0)
    noise = torch.randn(10, 1, 28, 28, generator=rng)
    levels = noise_levels(model.config["time_steps"], steps)
    *_, last = chosen.function(predict_and_show, noise, levels, rng, chosen.eta)
    show(last, last)
    # In the first third there is little but noise to be seen.
    durations = [60] * (steps // 3) + [140] * (steps - steps // 3) + [3000]
    write_gif(SAMPLES / "released.gif", frames, durations)


def guidance_rows(model, digit=3):
    """Return ten digits of one kind at several guidance scales, from the same noise."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, scale in zip(figure.subplots(len(GUIDANCE), 1), GUIDANCE, strict=True):
        digits = sample(model, torch.full((10,), digit), guidance=scale)[-1]
        axes.imshow(draw_grid(digits, 10))
        axes.set_ylabel(f"s = {scale}", rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    return figure


# ---- along t ----
@torch.no_grad()
def along_t(model):
    """Return a test digit noised at ten t, and the network's guess at each."""
    time_steps = model.config["time_steps"]
    image, label = (values[7:8] for values in train.load_mnist("test"))
    shares = torch.arange(10) / 10 + 0.05  # t / T, each in the middle of its picture
    t = (shares * time_steps).long()
    alpha_t, sigma_t = train.alpha_and_sigma(t, train.cumulative_alphas(time_steps))
    noise = torch.randn(10, 1, 28, 28, generator=generator("cpu", "samples", 0, 0))
    x_t = train.forward_diffusion_sample(image / 127.5 - 1, noise, alpha_t, sigma_t)
    guess = train.x_0_from_v(model(x_t, t, label.expand(10)), x_t, alpha_t, sigma_t)

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    for axes, images, name in zip(figure.subplots(2, 1, sharex=True), (x_t, guess),
                                  ("noisy image", "guess"), strict=True):
        axes.imshow(torch.cat(list(to_pixels(images)[:, 0]), dim=1), cmap="gray", vmin=0, vmax=255,
                    extent=(0, 1, 0, 0.1), aspect="auto")
        axes.set(yticks=[], xticks=torch.arange(11) / 10, ylabel=name)
    axes.set_xlabel("t / T")
    return figure


def density_of_t():
    """Return how often each t is drawn in training, with the interval of model guidance."""
    settings = train.Settings()
    drawn = train.draw_t(1_000_000, settings, generator("cpu", "step", 0)) / settings.time_steps
    figure = Figure(figsize=(9, 2), layout="constrained")
    axes = figure.subplots()
    axes.hist(drawn, bins=100, range=(0, 1), density=True, color="tab:blue", alpha=0.6)
    axes.axvspan(settings.guided_min, settings.guided_max, color="tab:orange", alpha=0.4,
                 label="model guidance")
    axes.set(xlim=(0, 1), yticks=[], xticks=torch.arange(11) / 10, xlabel="t / T",
             ylabel="how often\nt is drawn")
    axes.legend(loc="upper right")
    return figure


# ---- training ----
COLORS = {"A": "tab:gray", "B": "tab:olive", "C": "tab:green", "D": "tab:orange", "E": "tab:red",
          "recipe": "tab:blue"}


def curves(rows):
    """Return {name: (epochs, distances)}: means over the runs of each baseline and the recipe."""
    found = {}
    for name in COLORS:
        epochs = sorted({int(row["epochs"]) for row in rows if row["training"] == name})
        runs = [rows_of(rows, name, n) for n in epochs]
        distances = [statistics.mean(row["fid_classifier"] for row in run) for run in runs]
        found[name] = epochs, distances
    return found


def quality_over_epochs():
    """Return the Fréchet distance against the epochs of training."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    real, *rows = read_runs()
    for name, (epochs, distances) in curves(rows).items():
        axes.plot(epochs, distances, "o-", color=COLORS[name], lw=2)
        height = {"D": 6, "E": -6}.get(name, 0)  # these two begin close together
        axes.annotate(name, (epochs[0], distances[0]), (-8, height), color=COLORS[name], size=14,
                      textcoords="offset points", weight="bold", ha="right", va="center")
    axes.axhline(real["fid_classifier"], color="tab:gray", ls="--")
    axes.annotate("real digits", (0, real["fid_classifier"]), (6, 4), size=12,
                  xycoords=("axes fraction", "data"), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("epochs of training", size=13)
    axes.set_ylabel("Fréchet distance", size=13)
    axes.tick_params(labelsize=12)
    axes.xaxis.set_major_formatter("{x:g}")
    label_log_axis(axes.yaxis)
    axes.margins(0.2, 0.1)
    return figure


def race_frame(epochs, rows):
    """Return a picture: a row for each {name: ten digits (10, 1, 28, 28)}."""
    with style.context("dark_background"):
        figure = Figure(figsize=(8, 1.9), layout="constrained")
        for axes, (name, digits) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
            axes.imshow(draw_grid(torch.from_numpy(digits), 10))
            axes.set(xticks=[], yticks=[])
            axes.set_ylabel(name, size=14, rotation=0, ha="right", va="center")
        figure.suptitle(f"after {epochs} epoch{'s' if epochs > 1 else ''}", size=14)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
    return Image.open(picture).convert("L")


def race():
    """Write race.gif: ten digits of baseline E and of the recipe, run after run."""
    with np.load(RACE_FILE) as digits:
        frames = [race_frame(epochs, {name: digits[f"{name}_{epochs}"] for name in RACERS})
                  for epochs in EPOCHS]
    write_gif(FOLDER / "race.gif", frames, [1500] * (len(frames) - 1) + [4000])


# ---- command line ----
def main():
    """Draw all pictures."""
    model, _ = load_checkpoint(REPOSITORY / "checkpoints/pretrained.pth")
    digits_grid(model)
    way_from_noise(model)
    save_figure("guidance", guidance_rows, model)
    save_figure("along_t", along_t, model)
    save_figure("density_of_t", density_of_t)
    save_figure("quality", quality_over_epochs)
    race()


if __name__ == "__main__":
    run_script(main)
