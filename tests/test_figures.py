"""docs/figures.py: what does not need a minute of drawing."""
import figures


def test_quality_over_time_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.quality_over_time()
    assert (tmp_path / "time.png").stat().st_size > 10_000
