"""train.py: the schedule, the network, the data, files, the training loop, the command line."""
import copy
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError, Namespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call, error_of, read_csv, saved_state, use_small_mnist
from diffusers import DDPMScheduler
from PIL import Image
from scipy.special import logit
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import generate
import test
import train
from common import epoch_checkpoints, usable_device


# ---- noise schedule ----
def test_schedule_is_that_of_ddpm():
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(train.linear_beta_schedule(1000).float(), reference.betas)
    torch.testing.assert_close(train.cumulative_alphas(1000).float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("time_steps", [train.MIN_TIME_STEPS, 100, 200, 1000, 4000])
def test_schedule_ends_in_noise_for_every_t(time_steps):
    betas = train.linear_beta_schedule(time_steps)
    assert betas.dtype == torch.float64 and len(betas) == time_steps
    assert 0 < betas.min() and betas.max() < 1
    assert 0 < train.cumulative_alphas(time_steps)[-1] < 1e-4


def test_a_t_whose_last_beta_would_be_1_is_refused():
    assert train.linear_beta_schedule(1000)[-1] * 1000 / (train.MIN_TIME_STEPS - 1) >= 1
    with pytest.raises(train.InputError, match="at least 21"):
        train.linear_beta_schedule(train.MIN_TIME_STEPS - 1)


def test_forward_process_is_that_of_ddpm():
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    x_0, noise, t = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4), torch.arange(8) * 142
    x_t = train.forward_diffusion_sample(x_0, t, noise, train.cumulative_alphas(1000))
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, reference.add_noise(x_0, noise, t), rtol=1e-4, atol=1e-5)


# ---- network ----
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [28, 32])
def test_unet_keeps_the_shape(channels, image_size):
    model = train.SimpleUnet(channels, image_size)
    x = torch.randn(2, channels, image_size, image_size)
    assert model(x, torch.tensor([0, 999]), torch.tensor([3, train.NULL_LABEL])).shape == x.shape


def test_normalize_is_group_normalization_with_one_group():
    x = 3 * torch.randn(2, 6, 4, 4) + 1
    torch.testing.assert_close(train.normalize(x), torch.nn.functional.group_norm(x, 1))


def test_unet_sees_image_time_and_label(small_model):
    x, t, labels = torch.randn(1, 1, 28, 28), torch.tensor([500]), torch.tensor([3])
    eps = small_model(x, t, labels)
    for other in (small_model(x + 0.1, t, labels), small_model(x, t + 1, labels), small_model(x, t, labels + 1)):
        assert (other - eps).abs().max() > 1e-3


def test_unet_takes_the_same_share_of_every_t_alike(small_model):
    other = train.SimpleUnet(time_steps=200, widths=(8, 16))
    other.load_state_dict(small_model.state_dict())
    x, labels = torch.randn(1, 1, 28, 28), torch.tensor([3])
    torch.testing.assert_close(other(x, torch.tensor([100]), labels), small_model(x, torch.tensor([500]), labels))


# ---- data ----
@pytest.mark.parametrize("part, name, count", [(True, "train", 60000), (False, "t10k", 10000)])
def test_data_is_what_the_archives_hold(mnist, part, name, count):
    images, labels = mnist[part]
    raw = REPOSITORY / "mnist/MNIST/raw"
    pixels = np.frombuffer(gzip.decompress((raw / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    digits = np.frombuffer(gzip.decompress((raw / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images, pixels.reshape(count, 1, 28, 28))
    np.testing.assert_array_equal(labels, digits)


def test_data_takes_other_sizes_and_channels(mnist):
    images, _ = train.load_mnist(False, image_size=32, channels=3)
    assert images.shape == (10000, 3, 32, 32) and images.dtype == torch.uint8
    assert (images[:, 0] == images[:, 2]).all()
    assert abs(images.float().mean() - mnist[False][0].float().mean()) < 1


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: data[:-1] + b"\xff"],
                         ids=["truncated", "empty", "one byte changed"])
def test_damaged_unpacked_files_are_unpacked_again(tmp_path, monkeypatch, mnist, damage):
    shutil.copytree(REPOSITORY / "mnist", tmp_path / "mnist")
    unpacked = tmp_path / "mnist/MNIST/raw/t10k-images-idx3-ubyte"
    unpacked.write_bytes(damage(unpacked.read_bytes()))
    monkeypatch.setattr(train, "REPOSITORY", tmp_path)
    assert train.load_mnist(False)[0].equal(mnist[False][0])


def test_generator_depends_on_every_part_of_its_key():
    def draw(*key):
        return torch.randn(4, generator=train.generator(torch.device("cpu"), *key)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({str(draw(*key)) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1)]}) == 5


# ---- files ----
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), train.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_csv_can_be_read_back(tmp_path):
    train.write_csv(tmp_path / "a/log.csv", [{"epoch": 1, "note": "a, b"}, {"epoch": 2, "note": ""}])
    assert read_csv(tmp_path / "a/log.csv") == [{"epoch": "1", "note": "a, b"}, {"epoch": "2", "note": ""}]


# ---- training ----
class Recorder:
    """Stands in for the network: records what it is given and predicts 0."""

    def __init__(self, time_steps=1000):
        self.alphas_cumprod = train.cumulative_alphas(time_steps)

    def __call__(self, x_t, t, labels):
        self.x_t, self.t, self.labels = x_t, t, labels
        return torch.zeros_like(x_t)


def loss_of(model, batch_size=1000):
    x_0, labels = torch.ones(batch_size, 1, 4, 4), torch.full((batch_size,), 3)
    return train.training_loss(model, model.alphas_cumprod, x_0, labels, train.generator(torch.device("cpu"), 0))


def test_loss_is_the_squared_error_of_the_noise_weighted():
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    t = 1000 / (1 + np.exp(0.8 - norm.ppf((np.arange(20000) + 0.5) / 20000)))
    expected = (alphas_cumprod[t.astype(int)] ** -0.5).mean()  # the network says 0, the noise has variance 1
    assert loss_of(Recorder(), 20000).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("batch_size, time_steps", [(1000, 1000), (50, 1000), (256, 30)])
def test_t_is_spread_evenly_over_a_logit_normal_distribution(batch_size, time_steps):
    model = Recorder(time_steps)
    loss_of(model, batch_size)
    t = model.t.numpy()
    assert 0 <= t.min() and t.max() < time_steps
    least, most = (norm.cdf(logit(np.clip(end / time_steps, 0, 1)) + 0.8) * batch_size for end in (t, t + 1))
    i = np.arange(batch_size)  # the i-th lies in the i-th of batch_size equally likely parts
    assert (most >= i - 1e-3).all() and (least <= i + 1 + 1e-3).all()


def test_x_t_has_the_noise_that_its_t_asks_for():
    model = Recorder()
    loss_of(model, 10000)
    a = train.cumulative_alphas(1000)[model.t].view(-1, 1, 1, 1)
    noise = (model.x_t - a.sqrt()) / (1 - a).sqrt()  # x_0 is 1 everywhere
    for part in noise.split(2000):
        assert part.mean().item() == pytest.approx(0, abs=0.02) and part.std().item() == pytest.approx(1, abs=0.02)


def test_labels_are_dropped_at_their_rate():
    model = Recorder()
    loss_of(model, 10000)
    assert set(model.labels.tolist()) == {3, train.NULL_LABEL}
    assert (model.labels == train.NULL_LABEL).float().mean().item() == pytest.approx(train.LABEL_DROPOUT, abs=0.005)


def test_optimizers_move_every_weight_once():
    model = train.SimpleUnet(widths=(8, 16))
    before = copy.deepcopy(model.state_dict())
    optimizers = train.make_optimizers(model)
    assert sum(p.numel() for optimizer in optimizers for group in optimizer.param_groups
               for p in group["params"]) == sum(p.numel() for p in model.parameters())
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(torch.randn(p.shape))
    for optimizer in optimizers:
        optimizer.step()
    assert all((p != before[name]).any() for name, p in model.state_dict().items())


def test_muon_orthogonalises_the_step_of_a_kernel():
    """Muon's step is the gradient with its singular values set to about 1 (Jordan et al. 2024): 0.7 to 1.2 in torch."""
    model = train.SimpleUnet(widths=(8, 16))
    muon, _ = train.make_optimizers(model)
    kernel = model.mid1.conv1.weight
    before = kernel.detach().clone()
    kernel.grad.copy_(torch.randn(kernel.shape))
    muon.param_groups[0]["lr"] = 1.0
    muon.step()
    values = torch.linalg.svdvals((kernel - before).flatten(1))
    assert 0.5 < values.min() and values.max() < 1.5


@pytest.fixture
def form():
    """The flags that a new state depends on."""
    return Namespace(channels=1, image_size=28, time_steps=1000, seed=0, device=torch.device("cpu"))


@pytest.fixture
def state(form):
    return train.new_state(form)


def take_step(state):
    """Take a step of 400 on one image, with the seed 0."""
    train.training_step(state["model"], state, torch.zeros(1, 1, 28, 28), torch.tensor([3]), 0, 400)


def test_ema_follows_the_weights(state):
    expected = copy.deepcopy(state["model"].state_dict())
    for step in range(5):
        take_step(state)
        decay = (1 + step) / (10 + step)
        for name, p in state["model"].state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * p
    torch.testing.assert_close(dict(state["ema"].state_dict()), expected)


@pytest.mark.parametrize("step, factor", [(0, 0.01), (50, 0.51), (99, 1 - 99 / 400), (200, 0.5), (399, 1 / 400)])
def test_learning_rates_rise_over_100_steps_and_fall_to_0(state, step, factor):
    state["step"] = step
    take_step(state)
    for name, peak in train.LEARNING_RATES.items():
        assert state[name].param_groups[0]["lr"] == pytest.approx(factor * peak)


class HostReads(TorchDispatchMode):
    """Counts the operations that bring a tensor's value to the host, as .item() does: a GPU must be waited for then."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(state):
    take_step(state)
    with HostReads() as reads:
        take_step(state)
        assert reads.count == 0
        state["total_loss"].item()
    assert reads.count == 1


def run_small(root, *flags):
    size = [] if "--resume" in flags else ["--batch_size", "64"]
    train.main(["--root", str(root), "--device", "cpu", *size, *map(str, flags)])
    return generate.load_checkpoint([*epoch_checkpoints(root).values()][-1])


def test_the_loss_falls(tmp_path, small_mnist):
    run_small(tmp_path, "--n_epochs", 12, "--save_every", 12)
    log = read_csv(tmp_path / "datas/train_log.csv")
    assert [row["epoch"] for row in log] == [str(n) for n in range(1, 13)]
    assert list(log[0]) == ["epoch", "loss", "seconds", "images_per_second"]
    assert 3 < float(log[0]["loss"]) < 3.6  # at first eps is 0, and the loss the mean of the weights
    assert float(log[-1]["loss"]) < 0.2 * float(log[0]["loss"])


def test_a_run_depends_on_its_seed_alone(tmp_path, small_mnist):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        run_small(tmp_path / name, "--n_epochs", 2, "--seed", seed)
    first, again, other = ((tmp_path / name / "checkpoints/diffusion_epoch_2.pth").read_bytes()
                           for name in ("first", "again", "other"))
    assert first == again != other


def test_checkpoints_come_as_promised(tmp_path, small_mnist):
    model, checkpoint = run_small(tmp_path, "--n_epochs", 5, "--save_every", 2)
    assert {path.name for path in (tmp_path / "checkpoints").glob("*.*")} == {
        ".lock", "latest.pth", "diffusion_epoch_2.pth", "diffusion_epoch_4.pth", "diffusion_epoch_5.pth"}
    assert set(checkpoint) == {"epoch", "model_state_dict", "loss", "config"}
    assert checkpoint["epoch"] == 5 and isinstance(checkpoint["loss"], float)
    assert checkpoint["config"] == dict(channels=1, image_size=28, time_steps=1000, widths=(32, 64))
    assert not model.training and all(p.equal(checkpoint["model_state_dict"][name]) for name, p in
                                      model.state_dict().items())
    with Image.open(tmp_path / "datas/train_log.png") as picture:
        picture.load()


@pytest.mark.parametrize("flag, value", [("image_size", 32), ("channels", 3), ("time_steps", 200)])
def test_every_promised_flag_trains_and_samples(tmp_path, small_mnist, flag, value):
    model, _ = run_small(tmp_path, "--n_epochs", 1, f"--{flag}", value)
    assert model.config[flag] == value
    images = generate.generate_samples(model, 1, n_samples=3, save_dir=tmp_path)
    assert images.shape == (3, model.config["channels"], model.config["image_size"], model.config["image_size"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_trains_resumes_generates_and_evaluates(tmp_path, small_mnist):
    run_small(tmp_path, "--n_epochs", 1, "--device", "cuda")
    run_small(tmp_path, "--resume", "--n_epochs", 2, "--device", "cuda")
    generate.main(["--root", str(tmp_path), "--device", "cuda"])
    test.main(["--root", str(tmp_path), "--device", "cuda", "--n_samples", "2000"])
    assert [row["epoch"] for row in read_csv(tmp_path / "datas/metrics.csv")] == ["2"]


# ---- stopping and resuming ----
def stop_at(step, number):
    """Return a training_step that sends this process a signal before it does the run's n-th step."""
    take_step = train.training_step

    def training_step(network, state, *rest):
        if state["step"] + 1 == step:
            os.kill(os.getpid(), number)
        take_step(network, state, *rest)
    return training_step


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a run of three epochs of four steps."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_small_mnist(patch)
        run_small(folder, "--n_epochs", 3, "--save_every", 1)
    return folder


@pytest.mark.parametrize("step, number", [(1, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGINT)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(step, number, tmp_path, whole_run, small_mnist, monkeypatch,
                                                            capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "training_step", stop_at(step, number))
        run_small(tmp_path, "--n_epochs", 3, "--save_every", 1)
    assert stop.value.code == 128 + number
    assert f"--resume goes on from {tmp_path / train.LATEST}\n" in capsys.readouterr().err
    assert saved_state(tmp_path)["step"] == step  # the running step has ended
    run_small(tmp_path, "--resume")
    torch.testing.assert_close(saved_state(tmp_path), saved_state(whole_run), rtol=0, atol=0)
    for epoch, path in epoch_checkpoints(whole_run).items():
        assert epoch_checkpoints(tmp_path)[epoch].read_bytes() == path.read_bytes()
    logs = [[(row["epoch"], row["loss"]) for row in read_csv(root / "datas/train_log.csv")]
            for root in (tmp_path, whole_run)]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_a_finished_run_goes_on_when_asked_for_more_epochs(tmp_path, whole_run, small_mnist, capsys):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    assert "--n_epochs" in error_of(train.main, ["--root", str(tmp_path), "--resume"], capsys)
    run_small(tmp_path, "--resume", "--n_epochs", 4)
    state = train.load_tensors(tmp_path / train.LATEST)
    assert [row["epoch"] for row in state["log"]] == [1, 2, 3, 4] and state["args"]["n_epochs"] == 4
    assert state["muon"]["param_groups"][0]["lr"] == pytest.approx(0.02 * (1 - 15 / 16))  # planned anew, for 16 steps
    assert max(epoch_checkpoints(tmp_path)) == 4


def test_the_state_is_saved_from_time_to_time(tmp_path, small_mnist, monkeypatch):
    monkeypatch.setattr(train, "SAVE_INTERVAL", 0)
    steps, save_state = [], train.save_state
    monkeypatch.setattr(train, "save_state", lambda state, *_: steps.append(state["step"]) or save_state(state, *_))
    run_small(tmp_path, "--n_epochs", 1)
    assert steps == [0, 1, 2, 3, 4, 4]  # before every step, with the first checkpoint and at the end


# ---- several processes ----
def run_processes(folder, count, *flags):
    """Run train.py in that many processes for an epoch of 20 steps, or to resume one; return its stdout."""
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    done = call(folder, *program, "src/train.py", "--device", "cpu", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_do_what_one_does_and_resume_each_other(small_repository):
    roots = {count: small_repository / f"of_{count}" for count in (1, 2)}
    for count, root in roots.items():
        printed = run_processes(small_repository, count, "--root", root, "--batch_size", 150, "--n_epochs", 1)
        assert printed.count("training 6") == printed.count("checkpoints: ") == 1
    for epoch in (1, 2):
        one, two = (saved_state(root) for root in roots.values())
        assert one["step"] == two["step"] == 20 * epoch and [n for n, _ in one["log"]] == [*range(1, epoch + 1)]
        torch.testing.assert_close(one["log"], two["log"], rtol=1e-3, atol=0)
        torch.testing.assert_close(one["ema"], two["ema"], rtol=0, atol=2e-3)
        if epoch == 1:
            for count, root in roots.items():
                run_processes(small_repository, 3 - count, "--root", root, "--resume", "--n_epochs", 2)


def test_a_signal_to_torchrun_saves_the_state(small_repository):
    root = small_repository / "signalled"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "src/train.py",
               "--root", root, "--batch_size", "150", "--save_every", "1", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=small_repository, stderr=subprocess.PIPE, text=True)
    while not epoch_checkpoints(root) and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert "--resume goes on from" in process.communicate(timeout=60)[1]
    assert saved_state(root)["step"] > 20  # the first epoch's


@pytest.mark.parametrize("device, backends", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_processes_can_share_what_lies_on_any_device(device, backends, tmp_path, two_gpus, monkeypatch):
    def init_process_group(given):
        assert given == backends
        raise InterruptedError

    monkeypatch.setattr(train.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(train.dist, "init_process_group", init_process_group)
    with pytest.raises(InterruptedError):
        train.main(["--root", str(tmp_path), "--device", device])


@pytest.fixture
def two_gpus(monkeypatch):
    """Let torch say that there are two GPUs."""
    for name, function in dict(is_available=lambda: True, device_count=lambda: 2, set_device=lambda _: None).items():
        monkeypatch.setattr(torch.cuda, name, function)


def test_torchrun_deals_out_the_gpus(two_gpus, monkeypatch):
    assert [usable_device(text).index for text in ("cuda", "cuda:1")] == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert usable_device("cuda").index == 1
    for text in ("cuda:0", "cuda:1"):
        with pytest.raises(ArgumentTypeError, match="torchrun"):
            usable_device(text)


def test_a_batch_that_processes_cannot_share_is_refused(small_repository):
    done = call(small_repository, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "src/train.py",
                "--root", "odd", "--batch_size", 25, "--device", "cpu")
    assert done.returncode == 1 and "--batch_size 25" in done.stderr


# ---- command line ----
def test_a_run_is_replaced_only_when_asked(tmp_path, small_mnist):
    (tmp_path / "datas").mkdir()
    (tmp_path / "datas/metrics.csv").touch()  # of the released weights: no run
    run_small(tmp_path, "--n_epochs", 2, "--save_every", 1)
    with pytest.raises(train.InputError, match="--overwrite"):
        run_small(tmp_path, "--n_epochs", 1)
    ours, foreign = ({tmp_path / "datas" / name for name in names.split()} for names in (
        "metrics.csv metrics.png metrics_profile.png metrics_closest_10.png",
        "metrics_mine.csv metrics_closest_mine.png train_log.old.csv reference.npz"))
    for path in ours | foreign:
        path.touch()
    assert (tmp_path / "checkpoints/diffusion_epoch_2.pth").exists()
    (tmp_path / "checkpoints/classifier.pth").touch()
    run_small(tmp_path, "--n_epochs", 1, "--overwrite")
    assert {path.name for path in (tmp_path / "checkpoints").glob("*.pth")} == {
        "diffusion_epoch_1.pth", "latest.pth", "classifier.pth"}
    assert all(path.exists() for path in foreign) and not any(path.exists() for path in ours)


def test_importing_runs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'src')!r}); import test, generate, train"
    done = call(tmp_path, "-c", code, "--no_such_flag")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train", "generate", "test"])
def test_help_says_what_every_flag_does(script):
    done = call(REPOSITORY, f"src/{script}.py", "--help")
    assert done.returncode == 0 and "(default: None)" not in done.stdout
    flags = re.split(r"\n  (?=-)", done.stdout)[1:]
    assert len(flags) > 8 and all(len(flag.split(maxsplit=2)[2]) > 10 for flag in flags)
    assert "folder of checkpoints, generated_samples and datas (default: .)" in re.sub(r"\s+", " ", done.stdout)


def test_train_as_a_user_runs_it(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert "on cpu" in done.stdout and "epoch 2/2" in done.stderr and "images/s" in done.stderr
    assert (folder / "checkpoints/diffusion_epoch_2.pth").exists()
    assert (folder / "datas/train_log.csv").exists() and (folder / "datas/train_log.png").exists()


def test_benchmark_of_training(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "TRAINING_STEPS", 1)
    benchmark.main(["training", "--batch_size", "8", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert re.findall(r"^(.+?)  +\d+ ", printed, re.MULTILINE) == ["training", "textbook loop", "matrix product"]
    mflop = int(re.search(r"(\d+) MFLOP an image", printed)[1])
    assert mflop == pytest.approx(3 * 92.5, rel=0.03)  # backwards costs twice as much as forwards


@pytest.mark.parametrize("name", benchmark.RECIPES)
def test_benchmark_of_the_recipe_changes_what_it_says(name, form):
    with mock.patch.multiple(train, **benchmark.RECIPES[name]):
        changed = train.new_state(form)
        take_step(changed)
    assert changed["total_loss"].isfinite()
