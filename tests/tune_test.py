import pytest

from experiments import tune
from tests import programs_test

ARGUMENTS = (
  *("--recipe", "digits", "--num-train", "60", "--width", "0.05"),
  *("--training.num-epochs", "1", "--seeds", "2"),
)


def run(*arguments):
  programs_test.call(tune, *ARGUMENTS, *arguments)


@pytest.mark.slow
def test_trials_are_kept_and_not_done_again(tmp_path, capsys):
  table = tmp_path / "tables" / "digits.csv"
  run("--rates", "0.05", "--table", str(table))
  before = table.read_text()
  rows = tune.read(table)
  assert [row.seed for row in rows] == [2022, 2023]
  assert rows[0].figures["spread"] is None
  assert rows[1].figures["spread"] > 0
  assert 0 <= rows[0].figures["accuracy"] <= 1
  capsys.readouterr()
  run("--rates", "0.05", "0.1", "--table", str(table))
  # The seconds of a training done anew would differ.
  assert table.read_text().startswith(before)
  assert len(tune.read(table)) == 4
  assert len(capsys.readouterr().out.strip().splitlines()) == 2
  assert not (tmp_path / "runs").exists()


def test_the_first_line_is_near_the_best_with_the_lowest_loss():
  def rows(rate, accuracies, loss):
    trial = tune.Trial("one_cycle", rate, 32, 5, 100)
    return [
      tune.Row(
        trial,
        seed,
        {"accuracy": accuracy, "loss": loss, "spread": 0.1, "seconds": 1.0},
      )
      for seed, accuracy in enumerate(accuracies)
    ]

  # The best by its mean; one within its standard error; one that is not.
  table = [
    *rows(0.05, (0.90, 0.94), 0.3),
    *rows(0.1, (0.91, 0.92), 0.2),
    *rows(0.2, (0.80, 0.80), 0.1),
  ]
  lines = tune.summary(table).splitlines()
  assert [line.split()[1] for line in lines] == ["0.1", "0.05", "0.2"]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--rates", "-1"), "rates must be finite, positive, got -1"),
    (("--epochs", "0"), "epochs must be an integer of at least 1, got 0"),
    (("--table", __file__), "tune_test.py must have 1 cells a row, got 0"),
  ],
)
def test_bad_input(capsys, arguments, words):
  assert words in programs_test.failing(capsys, tune, *ARGUMENTS, *arguments)
