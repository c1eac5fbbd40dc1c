"""docs/peers.py: the loop around another's model. The models are not in the repository."""
import pytest
from conftest import error_of

import peers
import test
from generate import spread_labels
from train import load_mnist


@pytest.mark.parametrize("peer", sorted(peers.PEERS))
def test_a_folder_that_is_no_clone_of_the_peer(peer, tmp_path, capsys):
    assert "right clone" in error_of(peers.main, [peer, str(tmp_path)], capsys)


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_peer_is_trained_and_its_digits_can_be_evaluated(has_labels, tmp_path, monkeypatch):
    runs = []

    def build(folder, total_steps, device):
        """A model that draws every digit in one grey, and counts its steps."""
        runs.append([total_steps, 0])

        def step(images, labels):
            assert images.shape == (50, 1, 28, 28) and 0 <= images.min() < images.max() <= 1
            assert labels.shape == (50,)
            runs[-1][1] += 1
        return step, lambda labels: (labels / 8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    monkeypatch.setitem(peers.PEERS, "minRF", peers.Peer(build, 50, has_labels))
    path = tmp_path / "digits.npz"
    peers.main(["minRF", str(tmp_path), "--seconds", "0.05", "--out", str(path),
                "--device", "cpu"])
    (_, tried), (asked, taken) = runs
    assert tried == 11 and asked == taken >= 1
    images, labels = test.load_digits(path)
    kinds = spread_labels(load_mnist("test")[1], 2000)
    grey = (kinds / 8 * 255).round().clamp(max=255)  # eights are white, and nines cannot be whiter
    assert (images == grey.view(-1, 1, 1, 1)).all() and images.shape == (2000, 1, 28, 28)
    if has_labels:
        assert (labels == kinds).all()
    else:
        assert labels is None
    assert path.with_suffix(".png").exists()
