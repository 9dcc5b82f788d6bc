"""Builders that turn raw files into TFDS data sets, without TensorFlow."""

from psg_jax import programs

programs.expect_signals()
