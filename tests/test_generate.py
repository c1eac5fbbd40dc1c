"""generate.py: samplers against references and mathematics, sampling, output, checkpoints."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import call, write_checkpoint
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

import generate
import test
import train
from common import UserError, generator

CPU = torch.device("cpu")


# ---- samplers ----
@pytest.mark.parametrize("time_steps", [21, 100, 1000, 4000])
def test_steps_lead_from_noise_to_the_clean_image(time_steps):
    alphas_cumprod = train.cumulative_alphas(time_steps)
    for steps in {1, 2, 12, 13, 14, 20, 21, time_steps // 2, time_steps - 1, time_steps}:
        levels = generate.noise_levels(time_steps, steps)
        t, alphas, sigmas = zip(*levels, strict=True)
        assert len(levels) == steps + 1 and t[0] == time_steps - 1 and levels[-1] == (-1, 1, 0)
        assert all(early > late for early, late in itertools.pairwise(t))
        a = alphas_cumprod[list(t[:-1])].numpy()
        np.testing.assert_allclose(alphas[:-1], np.sqrt(a))
        np.testing.assert_allclose(sigmas[:-1], np.sqrt(1 - a))


def test_steps_grow_shorter_until_they_visit_every_t():
    assert [t for t, _, _ in generate.noise_levels(1000, 5)] == [999, 715, 464, 252, 88, -1]
    assert [t for t, _, _ in generate.noise_levels(100, 100)] == list(range(99, -2, -1))


def implying(predict_noise, clip):
    """Return the predict_x_0 that a sampler asks for, by a function that predicts the noise."""
    def predict_x_0(x_t, t, alpha_t, sigma_t):
        x_0 = (x_t - sigma_t * predict_noise(x_t, t)) / alpha_t
        return x_0.clamp(-1, 1) if clip else x_0
    return predict_x_0


def smooth_noise(x_t, t):
    """Something to predict: not linear in x_t, different at every t."""
    return torch.tanh(x_t) * (0.5 + t / 2000) + 0.1 * math.sin(t)


def level_of(times):
    """Return the levels (t, alpha_t, sigma_t) of these t."""
    a = train.cumulative_alphas(1000).tolist()
    return [(t, math.sqrt(a[t]), math.sqrt(1 - a[t])) for t in times]


BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")


def reference_scheduler(sampler, clip, eta):
    """Return diffusers' scheduler and the extra arguments of its step()."""
    if sampler == "ddpm":
        return DDPMScheduler(**BETAS, variance_type="fixed_small", clip_sample=clip), {}
    if sampler == "ddim":
        more = dict(eta=eta, use_clipped_model_output=True)
        return DDIMScheduler(**BETAS, clip_sample=clip), more
    solver = "sde-dpmsolver++" if eta else "dpmsolver++"  # its thresholding up to 1 is clipping
    return DPMSolverMultistepScheduler(
        **BETAS, solver_order=2, algorithm_type=solver, final_sigmas_type="zero",
        thresholding=clip, sample_max_value=1.0), {}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler, eta, steps", [
    ("ddpm", 1, 1000), ("ddim", 0, 50), ("ddim", 1, 50), ("dpm", 1, 12), ("dpm", 1, 50),
    ("dpm", 0, 12)])
def test_sampler_agrees_with_diffusers_step_by_step(sampler, eta, steps, clip):
    reference, more = reference_scheduler(sampler, clip, eta)
    reference.set_timesteps(steps)
    levels = [*level_of(reference.timesteps.tolist()), (-1, 1.0, 0.0)]
    theirs = noise = torch.randn(2, 1, 8, 8, generator=generator(CPU, "samples", 0))
    our_rng, their_rng = generator(CPU, "samples", 1), generator(CPU, "samples", 1)
    function = generate.SAMPLERS[sampler].function
    predict_x_0 = implying(smooth_noise, clip)
    for ours, t in zip(function(predict_x_0, noise, levels, our_rng, eta),
                       reference.timesteps, strict=True):
        eps = smooth_noise(theirs, t.item())
        theirs = reference.step(eps, t, theirs, generator=their_rng, **more).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


MEAN, STD = 0.3, 0.2


def gaussian_noise(x_t, a):
    """sigma_t (x_t - alpha_t MEAN) / (alpha_t^2 STD^2 + sigma_t^2): best for N(MEAN, STD^2)."""
    return math.sqrt(1 - a) * (x_t - math.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)


@pytest.mark.parametrize("sampler, steps, eta", [
    ("ddim", 1000, 1), ("ddim", 1000, 0), ("dpm", 100, 1), ("dpm", 1000, 0)])
def test_sampler_recovers_a_gaussian(sampler, steps, eta):
    alphas_cumprod, rng = train.cumulative_alphas(1000).tolist(), generator(CPU, "samples", 0)
    noise = torch.randn(1, 1, 200, 200, generator=rng)
    function = generate.SAMPLERS[sampler].function
    predict_x_0 = implying(lambda x_t, t: gaussian_noise(x_t, alphas_cumprod[t]), clip=False)
    *_, x = function(predict_x_0, noise, generate.noise_levels(1000, steps), rng, eta)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm", 2)])
def test_error_of_deterministic_solver_falls_with_its_order(sampler, order):
    """Along the exact flow (x_t - alpha_t MEAN) / sqrt(alpha_t^2 STD^2 + sigma_t^2) is constant."""
    def scale(a):
        return math.sqrt(a * STD**2 + 1 - a)

    first, last = 0.01, 0.9
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = math.sqrt(last) * MEAN + (x - math.sqrt(first) * MEAN) / scale(first) * scale(last)
    function, errors = generate.SAMPLERS[sampler].function, []
    rng = generator(CPU, "samples", 0)  # of no effect, since eta is 0
    for steps in (20, 40, 80):
        lambdas = torch.linspace(math.log(first / (1 - first)), math.log(last / (1 - last)),
                                 steps + 1, dtype=torch.float64)
        a = lambdas.sigmoid().tolist()
        levels = [(level, math.sqrt(level), math.sqrt(1 - level)) for level in a]  # here t is a
        *_, result = function(implying(gaussian_noise, clip=False), x, levels, rng, 0)
        errors.append((result - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


# ---- sampling ----
def clean(*settings, **more):
    return generate.sample(*settings, **more)[-1]


@pytest.mark.parametrize("sampler", generate.SAMPLERS)
def test_an_image_depends_on_seed_and_index_alone(small_model, sampler):
    labels = torch.arange(130) % 10
    many, few = (clean(small_model, labels[:n], sampler, steps=5).int() for n in (130, 3))
    assert many.shape == (130, 1, 28, 28) and many[:3].equal(few)
    others = clean(small_model, labels[:3], sampler, steps=5, seed=1).int()
    assert (others - few).abs().float().mean() > 10
    assert (many[100:103] - few).abs().float().mean() > 10


def test_guidance_weighs_label_against_null_in_one_evaluation(small_model):
    labels, null = torch.tensor([3, 7]), torch.full((2,), train.NULL_LABEL)
    a = train.cumulative_alphas(1000)[500].item()
    x_t = torch.randn(2, 1, 28, 28, generator=generator(CPU, "samples", 0))
    batches = []

    def model(x, t, y):
        batches.append(len(x))
        return small_model(x, t, y)

    def predict(labels, guidance):
        predict_x_0 = generate.clean_image_predictor(model, labels, guidance)
        return predict_x_0(x_t, 500, math.sqrt(a), math.sqrt(1 - a))

    x_0, x_null = {s: predict(labels, s) for s in (0, 1, 3)}, predict(null, 1)
    assert batches == [4, 2, 4, 2] and all(x.abs().max() <= 1 for x in x_0.values())
    torch.testing.assert_close(x_0[0], x_null, rtol=0, atol=0.1)  # maybe in bfloat16
    guided = (x_null + 3 * (x_0[1] - x_null)).clamp(-1, 1)
    assert (x_0[1] - x_null).abs().mean() > 0.1
    torch.testing.assert_close(x_0[3], guided, rtol=0, atol=0.3)


def test_frames_end_with_the_clean_images(small_model):
    labels = torch.arange(103) % 10
    frames = generate.sample(small_model, labels, steps=6, n_frames=3)
    assert frames.shape == (3, 103, 1, 28, 28)
    assert frames[-1].equal(clean(small_model, labels, steps=6))
    assert len(generate.sample(small_model, labels[:1], steps=6, n_frames=24)) == 6


def test_ddim_takes_all_steps_of_a_short_schedule():
    model = train.SimpleUnet(time_steps=30, widths=(8, 16)).eval()
    one = torch.tensor([1])
    assert clean(model, one, "ddim").equal(clean(model, one, "ddim", steps=30))


def test_labels_cycle_or_are_drawn_from_the_seed():
    assert generate.choose_labels(5, [3, 1]).tolist() == [3, 1, 3, 1, 3]
    drawn = generate.choose_labels(1000)
    assert drawn[:16].equal(generate.choose_labels(16)) and set(drawn.tolist()) == set(range(10))
    assert not drawn.equal(generate.choose_labels(1000, seed=1))


# ---- forms of output ----
def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def test_grid_shows_every_image_in_order():
    greys = torch.arange(7, dtype=torch.uint8) * 30 + 20
    images = greys[:, None, None, None].expand(7, 3, 28, 28)
    pixels = np.asarray(generate.draw_grid(images, 3).convert("L"))
    scale = pixels.shape[1] // 88  # 3 images and 4 borders
    assert pixels.shape == (88 * scale, 88 * scale)
    centres = pixels[15 * scale::29 * scale, 15 * scale::29 * scale]
    assert centres.flatten().tolist() == [20, 50, 80, 110, 140, 170, 200, 0, 0]


@pytest.fixture(params=[1, 3], ids=["grey", "RGB"])
def make(request, tmp_path):
    """A function that returns the path of 13 digits that 'generate.py' has drawn.

    out: the file to write; without it, the grid.
    """
    torch.manual_seed(0)
    model = train.SimpleUnet(channels=request.param, widths=(8, 16))
    write_checkpoint(tmp_path / "x.pth", model, 1)
    flags = f"--root {tmp_path} --checkpoint_path {tmp_path}/x.pth --n_samples 13 --labels 3 1 4"

    def make(out=None):
        generate.main([*flags.split(), "--steps", "4", *(["--out", str(out)] if out else [])])
        return out or tmp_path / "generated_samples/generated_samples_1.png"
    return make


def test_npz_holds_the_images_of_the_grid_and_their_labels(make, tmp_path):
    with np.load(make(tmp_path / "digits.npz")) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape[:3] == (13, 28, 28)
    assert labels.dtype == np.int64 and labels.tolist() == [3, 1, 4] * 4 + [3]
    grid = generate.draw_grid(torch.from_numpy(images).permute(0, 3, 1, 2), 3)
    assert (read(make()) == np.asarray(grid.convert("L"))).all()


def test_gif_goes_from_noise_to_the_grid(make, tmp_path):
    with Image.open(make(tmp_path / "digits.gif")) as animation:
        assert animation.n_frames == 4 and animation.info["loop"] == 0
        animation.seek(3)
        last = np.asarray(animation.convert("L")).astype(int)
    assert abs(last - read(make())).mean() < 20  # 16 colours


# ---- from Python ----
def test_generate_samples_as_promised(small_model, tmp_path):
    images = generate.generate_samples(small_model, epoch=7, save_dir=str(tmp_path))
    assert images.shape == (16, 1, 28, 28) and images.dtype == torch.uint8
    assert [path.name for path in tmp_path.iterdir()] == ["generated_samples_7.png"]
    of_list, of_array = (
        generate.generate_samples(small_model, n_samples=3, labels=labels, save_dir=tmp_path)
        for labels in ([3, 1], np.array([3, 1])))
    assert of_list.equal(of_array)


def test_generate_samples_takes_the_weights_of_a_file(small_model, tmp_path):
    path = write_checkpoint(tmp_path / "some.pth", small_model, 30)
    fresh = train.SimpleUnet(widths=(8, 16))
    before = {name: p.clone() for name, p in fresh.state_dict().items()}
    images = generate.generate_samples(fresh, n_samples=2, checkpoint_path=str(path),
                                       save_dir=tmp_path)
    assert images.equal(generate.generate_samples(small_model, n_samples=2, save_dir=tmp_path))
    assert (tmp_path / "generated_samples_30.png").exists()
    torch.testing.assert_close(dict(fresh.state_dict()), before, rtol=0, atol=0)


# ---- checkpoints ----
def test_checkpoints_are_found_in_the_order_of_epochs(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    for name in ("diffusion_epoch_100.pth", "diffusion_epoch_20.pth", "diffusion_epoch_30.pth.tmp",
                 "diffusion_epoch_x.pth", "pretrained.pth"):
        (tmp_path / "checkpoints" / name).touch()
    found = [path.name for path in generate.find_checkpoints(tmp_path, 1000)]
    assert found == ["diffusion_epoch_20.pth", "diffusion_epoch_100.pth"]
    assert capsys.readouterr().err == ""
    assert len(generate.find_checkpoints(tmp_path, 99)) == 1
    assert "--epochs 100 takes all" in capsys.readouterr().err
    assert generate.find_checkpoints(tmp_path, 1, tmp_path / "mine.pth") == [tmp_path / "mine.pth"]
    with pytest.raises(UserError, match="epoch 20"):
        generate.find_checkpoints(tmp_path, 19)


def test_released_weights_stand_in_and_are_named(tmp_path, capsys):
    pretrained = train.REPOSITORY / "checkpoints/pretrained.pth"
    assert generate.find_checkpoints(tmp_path, 1000) == [pretrained]
    assert str(pretrained) in capsys.readouterr().out


def test_they_do_not_stand_in_for_a_run_that_has_no_checkpoint_yet(tmp_path):
    latest = tmp_path / train.LATEST
    latest.parent.mkdir()
    latest.touch()
    with pytest.raises(UserError, match=r"latest\.pth is of a run without a checkpoint"):
        generate.find_checkpoints(tmp_path, 1000)


# ---- command line ----
def test_labels_make_columns(small_model, tmp_path):
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_1.pth", small_model, 1)
    flags = "--labels 0 1 2 3 4 5 6 7 8 9 --n_samples 20 --steps 2".split()
    generate.main(["--root", str(tmp_path), *flags])
    height, width = read(tmp_path / "generated_samples/generated_samples_1.png").shape
    assert width / height == pytest.approx(291 / 59)


def test_out_takes_the_last_checkpoint(small_model, tmp_path, capsys):
    for epoch in (1, 2, 10):
        write_checkpoint(tmp_path / f"checkpoints/diffusion_epoch_{epoch}.pth", small_model, epoch)
    flags = ["--root", str(tmp_path), "--steps", "2", "--out", str(tmp_path / "digits.npz")]
    more_flags = ["--epochs", "9", "--labels", "10", "--guidance", "2.5"]
    for more, epoch in (([], 10), (more_flags, 2)):
        generate.main([*flags, *more])
        assert capsys.readouterr().out == f"epoch {epoch}: {tmp_path / 'digits.npz'}\n"
    with np.load(tmp_path / "digits.npz") as file:
        # test.py --digits takes the file, though no digit was asked for.
        assert file["arr_0"].shape == (16, 28, 28, 1) and "arr_1" not in file
    assert not (tmp_path / "generated_samples").exists()


def test_released_weights_draw_the_digit_asked_for():
    model, _ = generate.load_checkpoint(train.REPOSITORY / "checkpoints/pretrained.pth")
    classifier = test.load_classifier(CPU)
    labels = torch.arange(100) % 10
    for settings in (dict(), dict(guidance=2), dict(sampler="ddim", steps=20)):
        pixels = test.mnist_pixels(clean(model, labels, **settings))
        _, digits = test.classify(classifier, pixels)
        assert (digits == labels).double().mean() > 0.9


def test_generate_as_a_user_runs_it(trained):
    folder, _ = trained
    done = call(folder, "src/generate.py", "--n_samples", 7, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    pictures = [read(folder / f"generated_samples/generated_samples_{epoch}.png")
                for epoch in (1, 2)]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()
    assert all(f"generated_samples_{epoch}.png" in done.stdout for epoch in (1, 2))
