"""plots.py: smoothing of losses, and the picture of a run."""

import math
import os
import subprocess
import sys

import pytest

from helpers import ROOT
from nanofp8.plots import plot_losses, smooth


def test_skipped_steps_do_not_spoil_a_smoothed_curve():
    assert smooth([2.0, None, math.nan, 2.0]) == pytest.approx([2.0] * 4)
    assert math.isnan(smooth([None, 1.0])[0]) and smooth([None, 1.0])[1] == 1.0


def test_smoothing_is_unbiased():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5) and smooth([]) == []
    assert smooth([0.0, 1.0]) == pytest.approx([0.0, 1 / 1.9])


TRAIN = [dict(kind="train", step=i, tokens=100 * (i + 1), loss=5.0 - i) for i in range(3)]
VAL = [dict(kind="val", step=2, tokens=300, val_loss=3.5)]
SKIPPED = [dict(kind="train", step=3, tokens=400, loss=None)]


@pytest.mark.parametrize("records", [TRAIN, VAL, TRAIN + VAL, TRAIN + SKIPPED + VAL],
                         ids=["train", "val", "both", "with a skipped step"])
def test_the_picture_of_a_run(tmp_path, records):
    plot_losses(records, str(tmp_path / "loss.png"), "a$_$b")  # no mathematics
    png = (tmp_path / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_backend_that_jupyter_has_chosen_does_not_matter(tmp_path):
    """It sets MPLBACKEND for all that it starts, to one that other environments lack."""
    code = ("import sys; from nanofp8.plots import plot_losses; plot_losses([dict(kind='train', loss=1.0, tokens=5)], "
            "sys.argv[1], 'x')")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, cwd=ROOT,
                   env=os.environ | dict(MPLBACKEND="module://matplotlib_inline.backend_inline2"))
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        plot_losses(TRAIN, str(tmp_path / "loss.png"), "run")
    assert not list(tmp_path.iterdir())
