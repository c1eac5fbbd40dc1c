"""docs/figures.py: what does not need a minute of drawing."""
import numpy as np
from PIL import Image

import figures


def test_plots_have_a_light_and_a_dark_form(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.save_figure("time", figures.quality_over_time)
    light, dark = (Image.open(tmp_path / f"time{suffix}.png") for suffix in ("", "_dark"))
    assert light.size == dark.size and light.tobytes() != dark.tobytes()


def test_the_race_goes_from_minute_to_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    monkeypatch.setattr(figures, "RACE_FILE", tmp_path / "race.npz")
    digits = np.random.default_rng(0).integers(256, size=(2, 10, 1, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "race.npz", minutes=[1, 2], D=digits, recipe=digits[::-1])
    figures.race()
    with Image.open(tmp_path / "race.gif") as animation, Image.open(tmp_path / "race.png") as last:
        assert animation.n_frames == 2 and animation.size == last.size
