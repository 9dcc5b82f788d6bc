"""Builders that turn raw files into TFDS data sets, without TensorFlow."""
