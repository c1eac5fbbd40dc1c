"""Draw the pages' pictures anew, by the released weights and docs/tables/runs.csv: a minute.

    python docs/figures.py

generated_samples/released.png and .gif: a hundred digits, and the way of some from noise;
docs/figures/: what happens along t, what guidance does, and how digits become better in training.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import train
from common import REPOSITORY, generator, label_log_axis, replacing, run_script
from generate import (DEFAULT_SAMPLER, SAMPLERS, clean_image_predictor, draw_grid, load_checkpoint,
                      noise_levels, sample, to_pixels)
from benchmark import OVER_TIME
from runs import read_runs, rows_of

FOLDER = REPOSITORY / "docs/figures"
SAMPLES = REPOSITORY / "generated_samples"


def save_figure(figure, name):
    with replacing(FOLDER / name) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")


# ---- digits ----
def digits_grid(model):
    """A hundred digits, ten of each: two columns for each digit."""
    digits = sample(model, torch.arange(100) % 10)[-1]
    grid = ImageOps.scale(draw_grid(digits, 20), 3, Image.Resampling.NEAREST)
    with replacing(SAMPLES / "released.png") as file:
        grid.save(file, format="png")


def way_from_noise(model, steps=36):
    """x_t above, and below it the clean image that is predicted from it, for ten digits."""
    chosen = SAMPLERS[DEFAULT_SAMPLER]
    predict_x_0 = clean_image_predictor(model, torch.arange(10), guidance=1)
    frames = []

    def show(x_t, x_0):
        frames.append(draw_grid(to_pixels(torch.cat([x_t, x_0])), 10).quantize(16))

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
    duration = [60] * (steps // 3) + [140] * (steps - steps // 3) + [3000]  # ms
    with replacing(SAMPLES / "released.gif") as file:
        frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], loop=0,
                       duration=duration)


def guidance_rows(model, digit=3):
    """Ten digits of one kind at each of four strengths of guidance, from the same noise."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    strengths = 0, 1, 2, 4
    for axes, strength in zip(figure.subplots(len(strengths), 1), strengths, strict=True):
        digits = sample(model, torch.full((10,), digit), guidance=strength)[-1]
        axes.imshow(draw_grid(digits, 10))
        axes.set_ylabel(f"s = {strength}", rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    save_figure(figure, "guidance.png")


# ---- along t ----
@torch.no_grad()
def along_t(model):
    """A digit noised at ten t, what the network takes it to be, and how often each t is drawn."""
    settings = train.Settings()
    image, label = (values[7:8] for values in train.load_mnist("test"))
    places = torch.arange(10) / 10 + 0.05  # t / T, each in the middle of its picture
    t = (places * settings.time_steps).long()
    alpha_t, sigma_t = train.signal_and_noise(t, train.cumulative_alphas(settings.time_steps))
    noise = torch.randn(10, 1, 28, 28, generator=generator("cpu", "samples", 0, 0))
    x_t = train.forward_diffusion_sample(image / 127.5 - 1, noise, alpha_t, sigma_t)
    predicted = train.implied_x_0(model(x_t, t, label.expand(10)), x_t, alpha_t, sigma_t)

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    density, noised, clean = figure.subplots(3, 1, height_ratios=(1.6, 1, 1))
    drawn = train.draw_t(1_000_000, settings, generator("cpu", "step", 0)) / settings.time_steps
    density.hist(drawn, bins=100, range=(0, 1), density=True, color="tab:blue", alpha=0.5)
    first, last = drawn[len(drawn) // 4], drawn[len(drawn) // 2]  # the batch's second quarter
    density.axvspan(first, last, color="tab:orange", alpha=0.3, label="learns to guide itself")
    density.set(xlim=(0, 1), yticks=[], ylabel="how often\nt is drawn", xlabel="t / T")
    density.xaxis.tick_top()
    density.xaxis.set_label_position("top")
    density.legend(loc="upper right")
    for axes, images, name in ((noised, x_t, "x_t"), (clean, predicted, "predicted\nx_0")):
        axes.imshow(torch.cat(list(to_pixels(images)[:, 0]), dim=1), cmap="gray", vmin=0, vmax=255,
                    extent=(0, 1, 0, 0.1), aspect="auto")
        axes.set(xticks=[], yticks=[], ylabel=name)
    save_figure(figure, "along_t.png")


# ---- training ----
def mean_of(rows, column):
    return statistics.mean(float(row[column]) for row in rows)


def quality_over_time():
    """Frechet distance and accuracy against the time of training: the recipe and the baselines.

    The minutes are those of the machine that most runs were done on, and what was not timed there
    is left out. Distances are means over the runs on all machines.
    """
    real, *rows = read_runs()
    machine = statistics.mode(row["machine"] for row in rows)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colors = "tab:gray", "tab:orange", "tab:green", "tab:red", "tab:blue"
    places = (6, 6), (0, 12), (9, -2), (-40, -12), (4, 6)  # of the percentages, beside their dots
    for (what, runs), color, place in zip(OVER_TIME.items(), colors, places, strict=True):
        minutes, distances = [], []
        for run in runs:
            found = rows_of(rows, *run)
            timed = [row for row in found if row["machine"] == machine]
            if not timed:
                continue
            minutes.append(mean_of(timed, "seconds") / 60)
            distances.append(mean_of(found, "fid_classifier"))
            single = [row["fid_classifier"] for row in found]
            axes.plot([minutes[-1]] * len(single), single, ".", color=color, alpha=0.5)
            axes.annotate(f"{mean_of(found, 'accuracy'):.1%}", (minutes[-1], distances[-1]), place,
                          color=color, textcoords="offset points", bbox=dict(color="white", pad=0))
        axes.plot(minutes, distances, "o-", color=color, label=what)
    axes.axhline(real["fid_classifier"], color="black", linestyle="--", label="training images")
    axes.set(xscale="log", yscale="log", xlabel=f"minutes of training on {machine}",
             ylabel="Frechet distance")
    label_log_axis(axes.xaxis)
    label_log_axis(axes.yaxis)
    axes.margins(0.12)
    figure.legend(loc="outside upper center", ncols=2)
    save_figure(figure, "time.png")


# ---- command line ----
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.parse_args(argv)
    model, _ = load_checkpoint(REPOSITORY / "checkpoints/pretrained.pth")
    digits_grid(model)
    way_from_noise(model)
    guidance_rows(model)
    along_t(model)
    quality_over_time()


if __name__ == "__main__":
    run_script(main)
