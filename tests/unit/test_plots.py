"""Training curves as PNG and as tables."""

from pipeline.plots import plot_training_curves, series, write_training_tables

HISTORY = [
    {"step": 0, "validation.loss": 4.5},
    {"step": 1, "train.loss": 4.25, "train.learning_rate": 1e-05, "train.grad_norm": 2.0},
    {"step": 2, "train.loss": 3.0, "train.learning_rate": 0.0, "train.grad_norm": 1.5},
    {"step": 2, "validation.loss": 3.125},
]


def test_series_takes_the_events_that_have_the_key():
    assert series(HISTORY, "validation.loss") == ([0, 2], [4.5, 3.125])
    assert series(HISTORY, "nothing") == ([], [])


def test_equal_histories_give_equal_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        plot_training_curves(HISTORY, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plot_training_curves(HISTORY[:-1], tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_tables_hold_the_history(tmp_path):
    write_training_tables(HISTORY, tmp_path)
    assert (tmp_path / "validation.csv").read_text() == "step,loss\n0,4.5\n2,3.125\n"
    expected = "step,loss,learning_rate,grad_norm\n1,4.25,1e-05,2.0\n2,3.0,0.0,1.5\n"
    assert (tmp_path / "train.csv").read_text() == expected
