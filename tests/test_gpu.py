"""What only a GPU can show; skipped without one."""
import functools

import pytest
import torch

import generate
import test
import train
from common import REPOSITORY
from conftest import read_csv, saved_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def run(root, *flags):
    train.main([str(flag) for flag in ("--root", root, "--batch_size", 64, *flags)])


def test_a_gpu_trains_generates_and_evaluates(tmp_path, small_mnist):
    run(tmp_path, "--n_epochs", 2)
    checkpoint = torch.load(tmp_path / "checkpoints/diffusion_epoch_2.pth", weights_only=True)
    assert {values.device for values in checkpoint["model_state_dict"].values()} == {CPU}
    generate.main(["--root", str(tmp_path)])
    test.main(["--root", str(tmp_path), "--n_samples", "2000"])
    assert [row["epoch"] for row in read_csv(tmp_path / "datas/metrics.csv")] == ["real", "2"]


def test_a_run_goes_on_on_another_device(tmp_path, small_mnist):
    for epoch, device in enumerate(["cuda", "cpu", "cuda", "cuda"], 1):
        run(tmp_path, "--n_epochs", epoch, "--device", device, *["--resume"][:epoch - 1])
    state = saved_state(tmp_path)
    assert state["step"] == 16 and [epoch for epoch, _ in state["log"]] == [1, 2, 3, 4]


def test_a_captured_step_is_the_eager_one_bit_for_bit(mnist, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images, labels = (values.to(CUDA) for values in mnist["train"])
    captured, eager = (train.State(train.Settings(batch_size=64), CUDA) for _ in range(2))
    eager.replay = functools.partial(train.training_step, eager)
    for state in (captured, eager):
        for batch in train.epoch_batches(state.settings, 0, len(images), CUDA)[:50]:
            train.take_step(state, images[batch], labels[batch], 60)
    assert captured.replay is not None and captured.total_loss.equal(eager.total_loss)
    for name in ("model", "ema"):
        ours, theirs = (getattr(state, name).state_dict() for state in (captured, eager))
        assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_the_loss_and_its_gradients_are_those_of_a_cpu(mnist):
    torch.manual_seed(0)
    model, settings = train.SimpleUnet(), train.Settings()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)  # larger than training starts from
    images, labels = (values[:200] for values in mnist["train"])
    t, noise = torch.arange(200) * 5, torch.randn(images.shape)
    losses, gradients = [], []
    for device in (CUDA, CPU):
        model.to(device).zero_grad()
        values = (value.to(device) for value in (images / 127.5 - 1, t, noise, labels))
        alphas_cumprod = train.cumulative_alphas(1000).to(device)
        loss = train.training_loss(model, *values, alphas_cumprod, settings)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[1].norm()


def test_the_error_on_test_images_is_that_of_a_cpu(mnist):
    images, labels = (values[:1000] for values in mnist["test"])
    errors = []
    with test.judging():
        for device in (CPU, CUDA):
            model, _ = generate.load_checkpoint(REPOSITORY / "checkpoints/pretrained.pth", device)
            errors.append(test.noise_mse(model, images.to(device), labels.to(device),
                                         batch_size=256))
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
