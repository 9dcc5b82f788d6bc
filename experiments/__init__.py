"""Programs that train, unlearn, compare and report."""

from psg_jax import programs

programs.expect_signals()
