"""docs/figures.py: what does not need a minute of drawing."""
from PIL import Image

import figures


def test_plots_have_a_light_and_a_dark_form(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.save_figure("quality", figures.quality_over_epochs)
    light, dark = (Image.open(tmp_path / f"quality{suffix}.png") for suffix in ("", "_dark"))
    assert light.size == dark.size and light.tobytes() != dark.tobytes()


def test_the_race_goes_from_run_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.race()
    with Image.open(tmp_path / "race.gif") as animation:
        assert animation.n_frames == len(figures.EPOCHS)
