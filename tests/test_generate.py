"""generate.py: samplers against references and mathematics, sampling, checkpoints, the grid, the command line."""
import math

import numpy as np
import pytest
import torch
from conftest import call, write_checkpoint
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

import generate
import train

CPU = torch.device("cpu")


# ---- samplers ----
@pytest.mark.parametrize("time_steps", [21, 100, 1000, 4000])
@pytest.mark.parametrize("steps", [1, 2, 12, 13, 21])
def test_steps_lead_from_noise_to_the_clean_image(time_steps, steps):
    levels = generate.noise_levels(time_steps, steps)
    t = [level[0] for level in levels]
    assert len(levels) == steps and t[0] == time_steps - 1 and t[-1] >= 0
    assert all(early > late for early, late in zip(t, t[1:], strict=False))
    assert [level[2] for level in levels] == [level[1] for level in levels[1:]] + [1.0]
    assert [level[1] for level in levels] == train.cumulative_alphas(time_steps)[t].tolist()


def test_all_steps_are_every_t():
    assert [t for t, _, _ in generate.noise_levels(100, 100)] == list(range(99, -1, -1))


def smooth_eps(x_t, t):
    """Something to predict: not linear in x_t, different at every t."""
    return torch.tanh(x_t) * (0.5 + t / 2000) + 0.1 * math.sin(t)


REFERENCES = {
    "ddpm": lambda clip: DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, variance_type="fixed_small",
                                       clip_sample=clip, timestep_spacing="trailing"),
    "dpm": lambda clip: DPMSolverMultistepScheduler(1000, beta_start=1e-4, beta_end=0.02, solver_order=2,
                                                    algorithm_type="sde-dpmsolver++", final_sigmas_type="zero",
                                                    timestep_spacing="trailing"),
}


@pytest.mark.parametrize("sampler, clip, steps", [("ddpm", False, 1000), ("ddpm", True, 1000), ("ddpm", True, 50),
                                                  ("dpm", False, 12), ("dpm", False, 50)])
def test_sampler_agrees_with_diffusers_step_by_step(sampler, clip, steps):
    reference = REFERENCES[sampler](clip)
    reference.set_timesteps(steps)
    levels = generate.noise_levels(1000, steps)
    assert [t for t, _, _ in levels] == reference.timesteps.tolist()
    theirs = noise = torch.randn(2, 1, 8, 8, generator=train.generator(CPU, 0))
    our_rng, their_rng = train.generator(CPU, 1), train.generator(CPU, 1)
    for ours, t in zip(generate.SAMPLERS[sampler](smooth_eps, noise, levels, our_rng, clip), reference.timesteps,
                       strict=True):
        theirs = reference.step(smooth_eps(theirs, t.item()), t, theirs, generator=their_rng).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("dpm", 100)])
def test_sampler_recovers_a_gaussian(sampler, steps):
    """For data N(mean, std^2) the best eps is known: sigma_t (x_t - alpha_t mean) / (alpha_t^2 std^2 + sigma_t^2)."""
    mean, std, alphas_cumprod = 0.3, 0.2, train.cumulative_alphas(1000).tolist()

    def eps(x_t, t):
        a = alphas_cumprod[t]
        return math.sqrt(1 - a) * (x_t - math.sqrt(a) * mean) / (a * std**2 + 1 - a)

    rng = train.generator(CPU, 0)
    noise = torch.randn(1, 1, 200, 200, generator=rng)
    *_, x = generate.SAMPLERS[sampler](eps, noise, generate.noise_levels(1000, steps), rng, clip=False)
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("sampler", generate.SAMPLERS)
def test_clipping_keeps_images_in_range(sampler):
    levels, rng = generate.noise_levels(1000, 5), train.generator(CPU, 0)
    *_, x = generate.SAMPLERS[sampler](lambda x_t, t: -x_t, torch.randn(1, 1, 8, 8), levels, rng)
    assert x.abs().max() <= 1


# ---- sampling ----
@pytest.mark.parametrize("sampler", generate.SAMPLERS)
def test_an_image_depends_on_seed_and_index_alone(small_model, sampler):
    labels = torch.arange(130) % 10
    many, few = (generate.sample(small_model, labels[:n], sampler, steps=5).int() for n in (130, 3))
    assert many.shape == (130, 1, 28, 28) and many[:3].equal(few)
    others = generate.sample(small_model, labels[:3], sampler, steps=5, seed=1).int()
    assert (others - few).abs().float().mean() > 10
    assert (many[100:103] - few).abs().float().mean() > 10


def test_drawn_labels_depend_on_seed_and_index_alone(small_model, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(generate, "sample", lambda model, labels, *_: drawn.append(labels.tolist()) or
                        torch.zeros(len(labels), 1, 28, 28, dtype=torch.uint8))
    for n_samples, seed in ((16, 0), (1000, 0), (16, 1)):
        generate.generate_samples(small_model, n_samples=n_samples, save_dir=tmp_path, seed=seed)
    assert drawn[0] == drawn[1][:16] != drawn[2]
    assert set(drawn[1]) == set(range(10))


def test_more_steps_than_t_are_refused(small_model):
    with pytest.raises(train.InputError, match="1001 steps"):
        generate.sample(small_model, torch.tensor([1]), steps=1001)


# ---- grid ----
def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def test_grid_has_fixed_grey_limits(tmp_path):
    generate.save_grid(tmp_path / "grid.png", torch.full((4, 1, 28, 28), 100, dtype=torch.uint8), 2)
    assert set(np.unique(read(tmp_path / "grid.png"))) == {0, 100}


def test_grid_shows_every_image_in_order(tmp_path):
    images = (torch.arange(7, dtype=torch.uint8) * 30 + 20)[:, None, None, None].expand(7, 3, 28, 28)
    generate.save_grid(tmp_path / "grid.png", images, 3)
    pixels = read(tmp_path / "grid.png")
    scale = pixels.shape[1] // 88  # 3 images and 4 borders
    assert pixels.shape == (88 * scale, 88 * scale)
    centres = pixels[15 * scale::29 * scale, 15 * scale::29 * scale]
    assert centres.flatten().tolist() == [20, 50, 80, 110, 140, 170, 200, 0, 0]


# ---- from Python ----
def test_generate_samples_as_promised(small_model, tmp_path):
    images = generate.generate_samples(small_model, epoch=7, save_dir=str(tmp_path))
    assert images.shape == (16, 1, 28, 28) and images.dtype == torch.uint8
    assert [path.name for path in tmp_path.iterdir()] == ["generated_samples_7.png"]


def test_generate_samples_takes_the_weights_of_a_file(small_model, tmp_path):
    path = write_checkpoint(tmp_path / "some.pth", small_model, 30)
    fresh = train.SimpleUnet(widths=(8, 16))
    images = generate.generate_samples(fresh, n_samples=2, checkpoint_path=str(path), save_dir=tmp_path)
    assert images.equal(generate.generate_samples(small_model, n_samples=2, save_dir=tmp_path))
    assert (tmp_path / "generated_samples_30.png").exists() and (tmp_path / "generated_samples.png").exists()


def test_generate_samples_refuses_a_file_of_another_schedule(small_model, tmp_path):
    path = write_checkpoint(tmp_path / "some.pth", small_model, 30)
    with pytest.raises(train.InputError, match="time_steps"):
        generate.generate_samples(train.SimpleUnet(time_steps=200, widths=(8, 16)), checkpoint_path=path)


# ---- checkpoints ----
def test_checkpoints_are_found_in_the_order_of_epochs(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("diffusion_epoch_100.pth", "diffusion_epoch_20.pth", "diffusion_epoch_30.pth.tmp", "pretrained.pth"):
        (tmp_path / "checkpoints" / name).touch()
    found = [path.name for path in generate.find_checkpoints(tmp_path, 1000)]
    assert found == ["diffusion_epoch_20.pth", "diffusion_epoch_100.pth"]
    assert len(generate.find_checkpoints(tmp_path, 99)) == 1
    assert generate.find_checkpoints(tmp_path, 1, tmp_path / "mine.pth") == [tmp_path / "mine.pth"]
    with pytest.raises(train.InputError, match="epoch 20"):
        generate.find_checkpoints(tmp_path, 19)


def test_released_weights_stand_in_and_are_named(tmp_path, capsys):
    pretrained = train.REPOSITORY / "checkpoints/pretrained.pth"
    assert generate.find_checkpoints(tmp_path, 1000) == [pretrained]
    assert str(pretrained) in capsys.readouterr().out


# ---- command line ----
@pytest.mark.parametrize("text, labels", [("7", [7]), ("0-9", list(range(10))), ("3,1,4", [3, 1, 4]),
                                          ("0-2,9", [0, 1, 2, 9]), ("none", [train.NULL_LABEL])])
def test_labels_are_read(text, labels):
    assert generate.parse_labels(text) == labels


def test_labels_make_columns(small_model, tmp_path):
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_1.pth", small_model, 1)
    generate.main(["--root", str(tmp_path), "--labels", "0-9", "--n_samples", "20", "--steps", "2"])
    height, width = read(tmp_path / "generated_samples/generated_samples_1.png").shape
    assert width / height == pytest.approx(291 / 59)


def test_generate_as_a_user_runs_it(trained):
    folder, _ = trained
    done = call(folder, "src/generate.py", "--n_samples", 7, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    pictures = [read(folder / f"generated_samples/generated_samples_{epoch}.png") for epoch in (1, 2)]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()
    assert all(f"generated_samples_{epoch}.png" in done.stdout for epoch in (1, 2))
