"""train.py: noise, network, data, loss, the step, runs, the command line."""
import copy
import gzip
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (REPOSITORY, Oracle, call, error_of, read_csv, saved_state, use_small_mnist)
from diffusers import DDPMScheduler
from PIL import Image
from scipy.special import logit
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import train
from common import epoch_checkpoints, generator

CPU = torch.device("cpu")


# ---- noise schedule ----
def test_schedule_is_that_of_ddpm():
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(train.linear_beta_schedule(1000).float(), reference.betas)
    torch.testing.assert_close(train.cumulative_alphas(1000).float(), reference.alphas_cumprod,
                               rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("time_steps", [21, 100, 200, 1000, 4000])
def test_schedule_ends_in_noise_for_every_t(time_steps):
    betas = train.linear_beta_schedule(time_steps)
    assert betas.dtype == torch.float64 and len(betas) == time_steps
    assert 0 < betas.min() and betas.max() < 1
    assert 0 < train.cumulative_alphas(time_steps)[-1] < 1e-4


def test_forward_process_is_that_of_ddpm():
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    x_0, noise, t = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4), torch.arange(8) * 142
    alpha_t, sigma_t = train.alpha_and_sigma(t, train.cumulative_alphas(1000))
    x_t = train.forward_diffusion_sample(x_0, noise, alpha_t, sigma_t)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, reference.add_noise(x_0, noise, t), rtol=1e-4, atol=1e-5)


# ---- network ----
def test_normalize_is_group_normalization_with_one_group():
    x = 3 * torch.randn(2, 6, 4, 4) + 1
    torch.testing.assert_close(train.normalize(x), torch.nn.functional.group_norm(x, 1))


def test_unet_sees_image_time_and_label(small_model):
    x, t, labels = torch.randn(1, 1, 28, 28), torch.tensor([500]), torch.tensor([3])
    v = small_model(x, t, labels)
    for other in (small_model(x + 0.1, t, labels), small_model(x, t + 1, labels),
                  small_model(x, t, labels + 1)):
        assert (other - v).abs().max() > 1e-3


def test_unet_takes_the_same_share_of_every_t_alike(small_model):
    other = train.SimpleUnet(time_steps=200, widths=(8, 16))
    other.load_state_dict(small_model.state_dict())
    x, labels = torch.randn(1, 1, 28, 28), torch.tensor([3])
    torch.testing.assert_close(other(x, torch.tensor([100]), labels),
                               small_model(x, torch.tensor([500]), labels))


# ---- data ----
@pytest.mark.parametrize("part, name, count", [("train", "train", 60000), ("test", "t10k", 10000)])
def test_data_is_what_the_archives_hold(mnist, part, name, count):
    def content(of, offset):
        archive = REPOSITORY / f"mnist/MNIST/raw/{name}-{of}-ubyte.gz"
        return np.frombuffer(gzip.decompress(archive.read_bytes())[offset:], np.uint8)

    images, labels = mnist[part]
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images, content("images-idx3", 16).reshape(count, 1, 28, 28))
    np.testing.assert_array_equal(labels, content("labels-idx1", 8))


def test_data_takes_other_sizes_and_channels(mnist):
    images, _ = train.load_mnist("test", 32, 3)
    assert images.shape == (10000, 3, 32, 32) and images.dtype == torch.uint8
    assert (images[:, 0] == images[:, 2]).all()
    assert abs(images.float().mean() - mnist["test"][0].float().mean()) < 1


# ---- loss ----
@pytest.mark.parametrize("batch_size, time_steps", [(1000, 1000), (50, 1000), (256, 30)])
def test_t_is_spread_evenly_over_a_logit_normal_distribution(batch_size, time_steps):
    settings = train.Settings(time_steps=time_steps)
    t = train.draw_t(batch_size, settings, generator(CPU, "step", 0)).numpy()
    assert 0 <= t.min() and t.max() < time_steps
    least, most = (norm.cdf(logit(np.clip(end / time_steps, 0, 1)) - settings.t_mean) * batch_size
                   for end in (t, t + 1))
    i = np.arange(batch_size)  # the i-th lies in the i-th of batch_size equally likely parts
    assert (most >= i - 1e-3).all() and (least <= i + 1 + 1e-3).all()


def test_v_implies_the_clean_image():
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    x_0, noise, t = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4), torch.arange(8) * 142
    levels = train.alpha_and_sigma(t, train.cumulative_alphas(1000))
    v = scheduler.get_velocity(x_0, noise, t)
    x_t = train.forward_diffusion_sample(x_0, noise, *levels)
    torch.testing.assert_close(train.x_0_from_v(v, x_t, *levels), x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_loss_is_the_squared_error_of_v_weighted(power):
    x_0 = (torch.rand(1, 1, 4, 4) * 2 - 1).expand(500, -1, -1, -1)
    noise = torch.randn(500, 1, 4, 4)
    t, labels = torch.arange(500) * 2, torch.zeros(500, dtype=torch.int64)
    loss = train.training_loss(Oracle(x_0, 0.5), x_0, t, noise, labels,
                               train.cumulative_alphas(1000),
                               train.Settings(loss_power=power, model_guidance=0))
    weights = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[::2] ** (power / 2)
    assert loss.item() == pytest.approx(0.25 * weights.mean(), rel=1e-3)


@pytest.mark.parametrize("edge", [-1, 1])
def test_overshooting_black_or_white_costs_nothing(edge):
    x_0, noise = torch.full((8, 1, 4, 4), float(edge)), torch.randn(8, 1, 4, 4)
    t, labels = torch.arange(8) * 100, torch.zeros(8, dtype=torch.int64)
    losses = [train.training_loss(Oracle(x_0, error), x_0, t, noise, labels,
                                  train.cumulative_alphas(1000), train.Settings(loss_power=0))
              for error in (-0.5 * edge, 0.5 * edge)]
    beyond, within = losses  # v that is overestimated makes an image darker
    assert beyond.item() == 0 and within.item() == pytest.approx(0.25, rel=1e-3)


def test_inside_the_interval_the_network_learns_to_guide_itself():
    scale = torch.tensor(0.1, requires_grad=True)

    def model(x_t, t, labels):
        return scale * labels.view(-1, 1, 1, 1).expand_as(x_t)

    t = torch.tensor([10, 100, 180, 200, 300, 420, 500, 900])
    labels = torch.tensor([3, 3, 3, 3, train.NULL_LABEL, 3, 3, 3])
    noise, x_0 = torch.randn(2, 8, 1, 4, 4, generator=generator(CPU, "step", 0)) / 3
    settings = train.Settings(loss_power=0, clamp=torch.inf, model_guidance=0.4, guided_max=0.4)
    loss = train.training_loss(model, x_0, t, noise, labels, train.cumulative_alphas(1000),
                               settings)
    loss.backward()
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t].reshape(8, 1, 1, 1)
    alpha_t, sigma_t = np.sqrt(a), np.sqrt(1 - a)
    targets, x_t = x_0.numpy().copy(), alpha_t * x_0.numpy() + sigma_t * noise.numpy()
    # The third is outside, and the label of the fifth was dropped.
    x_label, x_null = (np.clip(alpha_t[3] * x_t[3] - sigma_t[3] * v, -1, 1) for v in (0.3, 1))
    targets[3] += 0.4 * (x_label - x_null)
    v = 0.1 * labels.numpy().reshape(8, 1, 1, 1)
    errors = v - (alpha_t * x_t - targets) / sigma_t
    assert loss.item() == pytest.approx((errors ** 2).mean(), rel=1e-2)  # maybe in bfloat16
    slope = (2 * errors * labels.numpy().reshape(8, 1, 1, 1)).mean()  # the target does not move
    assert scale.grad.item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("batch_size, processes, time_steps", [
    (1, 1, 1000), (3, 2, 1000), (64, 1, 1000), (64, 3, 1000), (1000, 2, 1000), (64, 1, 50)])
def test_the_guided_part_has_all_t_of_the_interval(batch_size, processes, time_steps):
    settings = train.Settings(time_steps=time_steps)
    first, last = round(0.19 * time_steps), round(0.31 * time_steps)
    for seed in range(20):
        all_t = train.draw_t(batch_size * processes, settings, generator(CPU, "step", seed))
        for rank in range(processes):
            t = all_t[rank::processes]
            inside = (first <= t) & (t < last)
            part, mask = train.guided_part(t, settings)
            assert mask.flatten().equal(inside[part]) and inside.sum() == inside[part].sum()
            assert 0 < len(t[part]) <= inside.sum() + 2


# ---- the step ----
@pytest.fixture
def state():
    return train.State(train.Settings(), CPU)


def test_optimizers_take_every_weight_once(state):
    kernels = [kernel for stack in state.muon.stacks for kernel in stack]
    others = state.adam.param_groups[0]["params"]
    assert {id(p) for p in kernels} | {id(p) for p in others} == {
        id(p) for p in state.model.parameters()}
    assert len(kernels) + len(others) == len(list(state.model.parameters()))
    assert all(kernel.ndim == 4 for kernel in kernels) and len(kernels) == 22


def take_step(state, images=None, labels=None):
    """Take the next of 400 steps, by default on a black image."""
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8) if images is None else images
    labels = torch.tensor([3]) if labels is None else labels
    train.take_step(state, images, labels, 400)


def test_a_step_shows_the_network_what_it_should(state):
    calls, forward = [], state.model.forward

    def fast_forward(x_t, t, labels):
        calls.append((x_t, t, labels))
        return forward(x_t[:1], t[:1], labels[:1]).expand_as(x_t)

    state.model.forward = fast_forward
    white = torch.full((10000, 1, 28, 28), 255, dtype=torch.uint8)
    take_step(state, white, torch.full((10000,), 3))
    (x_t, t, labels), (guided_x_t, guided_t, nulls) = calls
    a = train.cumulative_alphas(1000)[t].view(-1, 1, 1, 1)
    noise = (x_t - a.sqrt()) / (1 - a).sqrt()  # x_0 is 1 everywhere
    for part in noise.split(2000):
        assert part.mean().item() == pytest.approx(0, abs=0.01)
        assert part.std().item() == pytest.approx(1, abs=0.01)
    dropped = labels == train.NULL_LABEL
    assert dropped.float().mean().item() == pytest.approx(state.settings.label_dropout, abs=0.005)
    assert set(labels.tolist()) == {3, train.NULL_LABEL} and set(nulls.tolist()) == {10}
    part, _ = train.guided_part(t, state.settings)
    assert guided_x_t.equal(x_t[part]) and guided_t.equal(t[part])
    assert guided_t.min() in (189, 190) and guided_t.max() in (309, 310)


def test_the_ema_follows_the_weights(state):
    expected = copy.deepcopy(state.model.state_dict())
    for step in range(5):
        take_step(state)
        decay = (1 + step) / (10 + step)
        for name, p in state.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * p
    torch.testing.assert_close(dict(state.ema.state_dict()), expected)


@pytest.mark.parametrize("step, factor", [(0, 1), (100, 0.75), (200, 0.5), (399, 1 / 400)])
def test_learning_rates_decay_to_0(state, step, factor):
    state.steps_taken = step
    take_step(state)
    assert state.muon.rate.item() == pytest.approx(factor * state.settings.muon_rate)
    rate = state.adam.param_groups[0]["lr"]
    assert rate.item() == pytest.approx(factor * state.settings.adam_rate)


class HostReads(TorchDispatchMode):
    """Counts the operations that bring a value to the host: a GPU must be waited for then."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default,
                                   torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(state):
    take_step(state)
    with HostReads() as reads:
        take_step(state)
        assert reads.count == 0
        state.total_loss.item()
    assert reads.count == 1


# ---- runs ----
def run_small(root, *flags):
    """Train on 256 images in batches of 64; return what main returns."""
    size = [] if "--resume" in flags else ["--batch_size", "64"]
    return train.main(["--root", str(root), "--device", "cpu", *size, *map(str, flags)])


def last_checkpoint(root):
    """Return the model and the content of the last checkpoint."""
    return generate.load_checkpoint([*epoch_checkpoints(root).values()][-1])


def test_the_loss_falls(tmp_path, small_mnist):
    run_small(tmp_path, "--n_epochs", 7, "--save_every", 7)
    log = read_csv(tmp_path / "datas/train_log.csv")
    assert [row["epoch"] for row in log] == [str(n) for n in range(1, 8)]
    assert list(log[0]) == ["epoch", "loss", "seconds"]
    assert float(log[-1]["loss"]) < 0.5 * float(log[0]["loss"])


def test_a_run_depends_on_its_seed_alone(tmp_path, small_mnist):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        run_small(tmp_path / name, "--n_epochs", 2, "--seed", seed)
    first, again, other = ((tmp_path / name / "checkpoints/diffusion_epoch_2.pth").read_bytes()
                           for name in ("first", "again", "other"))
    assert first == again != other


def test_checkpoints_come_as_promised(tmp_path, small_mnist):
    run_small(tmp_path, "--n_epochs", 5, "--save_every", 2)
    _, checkpoint = last_checkpoint(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "latest.pth", "diffusion_epoch_2.pth", "diffusion_epoch_4.pth", "diffusion_epoch_5.pth"}
    assert set(checkpoint) == {"epoch", "model_state_dict", "loss", "config"}
    assert checkpoint["epoch"] == 5 and isinstance(checkpoint["loss"], float)
    assert checkpoint["config"] == dict(channels=1, image_size=28, time_steps=1000,
                                        widths=(32, 64), predicts="v")
    saved = saved_state(tmp_path)
    torch.testing.assert_close(checkpoint["model_state_dict"], saved["ema"], rtol=0, atol=0)
    with Image.open(tmp_path / "datas/train_log.png") as picture:
        picture.load()


@pytest.mark.parametrize("flag, value", [("image_size", 32), ("channels", 3), ("time_steps", 200)])
def test_every_promised_flag_trains_and_samples(tmp_path, small_mnist, flag, value):
    run_small(tmp_path, "--n_epochs", 1, f"--{flag}", value)
    model, _ = last_checkpoint(tmp_path)
    assert model.config[flag] == value
    images = generate.generate_samples(model, 1, n_samples=3, save_dir=tmp_path)
    assert images.shape == (3, model.config["channels"], *2 * [model.config["image_size"]])


def test_the_width_of_the_network(tmp_path, small_mnist):
    run_small(tmp_path, "--n_epochs", 1, "--width", 8)
    model, _ = last_checkpoint(tmp_path)
    assert model.config["widths"] == (8, 16)
    assert model.mid1.conv1.weight.shape == (16, 16, 3, 3)
    run_small(tmp_path, "--n_epochs", 2, "--resume")


# ---- stopping and resuming ----
def stop_at(step, number):
    """Return a take_step that sends this process a signal before it takes the run's n-th."""
    take_step = train.take_step

    def signalling_take_step(state, *rest):
        if state.steps_taken + 1 == step:
            os.kill(os.getpid(), number)
        take_step(state, *rest)
    return signalling_take_step


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a run of three epochs of four steps."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_small_mnist(patch)
        run_small(folder, "--n_epochs", 3, "--save_every", 1)
    return folder


@pytest.mark.parametrize("step, number", [
    (1, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGINT)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
        step, number, tmp_path, whole_run, small_mnist, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", stop_at(step, number))
        assert run_small(tmp_path, "--n_epochs", 3, "--save_every", 1) == 128 + number
    assert f"train.py --root {tmp_path} --resume\n" in capsys.readouterr().err
    assert saved_state(tmp_path)["step"] == step  # the running step has ended
    run_small(tmp_path, "--resume")
    torch.testing.assert_close(saved_state(tmp_path), saved_state(whole_run), rtol=0, atol=0)
    for epoch, path in epoch_checkpoints(whole_run).items():
        assert epoch_checkpoints(tmp_path)[epoch].read_bytes() == path.read_bytes()
    logs = [[(row["epoch"], row["loss"]) for row in read_csv(root / "datas/train_log.csv")]
            for root in (tmp_path, whole_run)]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_an_epochs_seconds_outlast_a_stop(tmp_path, small_mnist, monkeypatch):
    clock, take_step = SimpleNamespace(now=0), train.take_step

    def slow_take_step(*arguments):
        clock.now += 10
        take_step(*arguments)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(train, "take_step", slow_take_step)
    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", stop_at(3, signal.SIGTERM))
        run_small(tmp_path, "--n_epochs", 2)
    clock.now += 1000
    run_small(tmp_path, "--resume")
    seconds = [float(row["seconds"]) for row in read_csv(tmp_path / "datas/train_log.csv")]
    assert seconds == [40, 40]


def test_a_signal_in_the_last_step_does_not_stop_a_finished_run(tmp_path, small_mnist, monkeypatch):
    monkeypatch.setattr(train, "take_step", stop_at(4, signal.SIGTERM))
    assert run_small(tmp_path, "--n_epochs", 1) is None
    assert saved_state(tmp_path)["step"] == 4 and list(epoch_checkpoints(tmp_path)) == [1]


def test_main_leaves_signals_as_it_found_them(tmp_path, small_mnist, monkeypatch):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    run_small(tmp_path, "--n_epochs", 1)
    assert handlers() == before
    monkeypatch.setattr(train, "take_step", stop_at(6, signal.SIGINT))
    run_small(tmp_path, "--n_epochs", 2, "--resume")
    assert handlers() == before


def spoil(step):
    """Return a training_loss that is infinite in the n-th step."""
    loss_of, calls = train.training_loss, []

    def training_loss(*arguments):
        calls.append(1)
        return loss_of(*arguments) * (torch.inf if len(calls) == step else 1)
    return training_loss


@pytest.mark.parametrize("step, epoch", [(6, 2), (12, 3)])
def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(
        step, epoch, tmp_path, small_mnist, monkeypatch, capsys):
    monkeypatch.setattr(train, "training_loss", spoil(step))
    monkeypatch.setattr(train, "SAVE_INTERVAL", 0)
    flags = "--n_epochs 3 --batch_size 64 --save_every 1 --device cpu".split()
    assert f"step {step}" in error_of(train.main, ["--root", str(tmp_path), *flags], capsys)
    assert list(epoch_checkpoints(tmp_path)) == [*range(1, epoch)]
    state = saved_state(tmp_path)
    assert state["step"] == step - 1
    assert all(values.isfinite().all() for values in state["model"].values())


def test_a_finished_run_goes_on_when_asked_for_more(tmp_path, whole_run, small_mnist, capsys):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    assert "--n_epochs" in error_of(train.main, ["--root", str(tmp_path), "--resume"], capsys)
    run_small(tmp_path, "--resume", "--n_epochs", 4)
    state = torch.load(tmp_path / train.LATEST, weights_only=True)
    assert [row["epoch"] for row in state["log"]] == [1, 2, 3, 4]
    assert state["settings"]["n_epochs"] == 4
    rate = state["adam"]["param_groups"][0]["lr"].item()
    assert rate == pytest.approx(0.007 * (1 - 15 / 16))  # planned anew, for 16 steps
    assert max(epoch_checkpoints(tmp_path)) == 4


def test_the_state_is_saved_first_of_all_and_from_time_to_time(tmp_path, small_mnist, monkeypatch):
    steps, save_state = [], train.save_state
    monkeypatch.setattr(train, "save_state", lambda state, root: (
        steps.append(state.steps_taken), save_state(state, root)))
    run_small(tmp_path / "seldom", "--n_epochs", 1)
    monkeypatch.setattr(train, "SAVE_INTERVAL", 0)
    run_small(tmp_path / "often", "--n_epochs", 1)
    assert steps == [0, 4, 0, 1, 2, 3, 4]


# ---- several processes ----
def run_processes(folder, count, *flags):
    """Train on the small repository's images, for an epoch of 20 steps, in that many processes."""
    flags = ["--device", "cpu", "--image_size", "12", *map(str, flags)]
    if count == 1:
        train.main(flags)
    else:
        done = call(folder, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={count}", "src/train.py", *flags)
        assert done.returncode == 0 and done.stdout.count("training 6") == 1, done.stderr


def test_two_processes_do_what_one_does_and_resume_each_other(small_repository, monkeypatch):
    monkeypatch.setattr(train, "REPOSITORY", small_repository)
    roots = {count: small_repository / f"of_{count}" for count in (1, 2)}
    for count, root in roots.items():
        run_processes(small_repository, count, "--root", root, "--batch_size", 150,
                      "--n_epochs", 1)
    for epoch in (1, 2):
        one, two = (saved_state(root) for root in roots.values())
        assert one["step"] == two["step"] == 20 * epoch
        assert [n for n, _ in one["log"]] == [*range(1, epoch + 1)]
        torch.testing.assert_close(one["log"], two["log"], rtol=1e-3, atol=0)
        # Sums are taken in another order. In Adam's first steps that can turn the sign of a whole
        # step, where a gradient is near 0: so single weights differ more than their mean.
        for name, weights in one["ema"].items():
            assert (weights - two["ema"][name]).abs().mean() < 0.002
        if epoch == 1:
            for count, root in roots.items():
                run_processes(small_repository, 3 - count, "--root", root, "--resume",
                              "--n_epochs", 2)


def test_torchrun_deals_out_the_gpus(monkeypatch):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert train.choose_device("cuda") == torch.device("cuda:1")
    assert asked == [torch.device("cuda:1")]
    assert train.choose_device("cpu") == CPU


@pytest.mark.parametrize("device, chosen", [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_single_process_takes_the_gpu_it_is_told(device, chosen, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert train.choose_device(device) == torch.device(chosen)
    assert asked == [torch.device(chosen)]


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "dist", SimpleNamespace(
        is_torchelastic_launched=lambda: False, is_initialized=lambda: True,
        get_rank=lambda: 0, get_world_size=lambda: 2))
    flags = ["--root", str(tmp_path), "--batch_size", "25", "--device", "cpu"]
    assert "--batch_size 25" in error_of(train.main, flags, capsys)


# ---- command line ----
def test_a_run_is_never_overwritten(tmp_path, whole_run, small_mnist, capsys):
    for kept in ("latest.pth", "diffusion_epoch_2.pth"):
        (tmp_path / kept / "checkpoints").mkdir(parents=True)
        path = tmp_path / kept / "checkpoints" / kept
        shutil.copy(whole_run / "checkpoints" / kept, path)
        message = error_of(train.main, ["--root", str(tmp_path / kept)], capsys)
        assert str(path) in message and ("--resume" in message) == (kept == "latest.pth")
        assert [file for file in (tmp_path / kept).rglob("*") if file.is_file()] == [path]


def test_importing_runs_nothing(tmp_path):
    source = str(REPOSITORY / "src")
    code = f"import sys; sys.path.insert(0, {source!r}); import test, generate, train"
    done = call(tmp_path, "-c", code, "--no_such_flag")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train", "generate", "test"])
def test_help_says_what_every_flag_does(script):
    done = call(REPOSITORY, f"src/{script}.py", "--help")
    text = re.sub(r"\s+", " ", done.stdout)
    assert done.returncode == 0 and "None" not in text
    flags = re.split(r"\n  (?=-)", done.stdout)[1:]
    assert len(flags) > 8 and all(len(flag.split(maxsplit=2)[2]) > 10 for flag in flags)
    assert "(default: " in text


def test_train_as_a_user_runs_it(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert "on cpu" in done.stdout and "epoch 2/2" in done.stderr and "images/s" in done.stderr
    assert (folder / "checkpoints/diffusion_epoch_2.pth").exists()
    assert (folder / "datas/train_log.csv").exists() and (folder / "datas/train_log.png").exists()
