import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psg_jax import inference, models, torch_weights

KEY = jax.random.key(0)
SMALL = {"num_classes": 4, "num_channels": 3, "mean": 0.5, "std": 0.25}


def small(**options):
  model = models.create("all_cnn", **{**SMALL, "width": 0.05, **options})
  return model._replace(
    apply=jax.jit(model.apply),
    apply_train=jax.jit(model.apply_train),
    features=jax.jit(model.features),
  )


def test_number_of_parameters_is_the_papers():
  # Nine hand-counted layers of the 96/192 network on three channels.
  model = models.create("all_cnn", **{**SMALL, "num_classes": 10})
  shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))
  convolutions = 9 * (3 * 96 + 96 * 96 + 96 * 192 + 4 * 192 * 192) + 192 * 192
  norms = 2 * (2 * 96 + 6 * 192)
  head = 192 * 10 + 10
  sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])]
  assert sum(sizes) == convolutions + norms + head


@pytest.mark.parametrize("size", [32, 33, 64])
def test_any_input_size(size):
  model = small()
  images = jnp.zeros((2, size, size, 3))
  variables = model.init(KEY, images)
  assert model.apply(variables, images).shape == (2, 4)
  assert model.features(variables, images).shape == (2, 9)


def test_head_on_features_gives_logits():
  model = small()
  images = jax.random.uniform(KEY, (3, 32, 32, 3))
  variables = model.init(KEY, images)
  head = variables["params"]["head"]
  np.testing.assert_allclose(
    model.features(variables, images) @ head["kernel"] + head["bias"],
    model.apply(variables, images),
    atol=1e-6,
  )


def test_standardisation_is_inside():
  images = jax.random.uniform(KEY, (2, 32, 32, 3))
  plain = small(mean=0.0, std=1.0)
  variables = plain.init(KEY, images)
  mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
  np.testing.assert_allclose(
    small(mean=mean, std=std).apply(variables, images),
    plain.apply(variables, (images - jnp.array(mean)) / jnp.array(std)),
    atol=1e-5,
  )


def test_training_mode_equals_pytorch():
  torch = pytest.importorskip("torch", reason="PyTorch is a development extra")
  images = np.asarray(jax.random.uniform(KEY, (6, 10, 10, 3)))
  model = small(mean=0.0, std=1.0)
  variables = model.init(KEY, jnp.asarray(images))
  logits, updated = model.apply_train(variables, images, KEY)

  def layers():
    for i, stride in enumerate((1, 1, 2, 1, 1, 2, 1, 1)):
      kernel = variables["params"][f"block_{i}"]["kernel"]
      size, _, channels, filters = kernel.shape
      conv = torch.nn.Conv2d(
        channels, filters, size, stride, size // 2, bias=False
      )
      weight = torch.tensor(np.asarray(kernel.transpose(3, 2, 0, 1)))
      conv.weight = torch.nn.Parameter(weight)
      yield from (conv, torch.nn.BatchNorm2d(filters), torch.nn.ReLU())

  network = torch.nn.Sequential(*layers())
  with torch.no_grad():
    hidden = network(torch.tensor(images.transpose(0, 3, 1, 2)))
  head = variables["params"]["head"]
  expected = hidden.numpy().mean((2, 3)) @ np.asarray(head["kernel"])
  # Float32 sums in another order, through eight normalisations.
  np.testing.assert_allclose(logits, expected + head["bias"], atol=2e-4)
  for i in range(8):
    norm, stats = network[3 * i + 1], updated["batch_stats"][f"block_{i}"]
    np.testing.assert_allclose(stats["mean"], norm.running_mean, atol=1e-4)
    np.testing.assert_allclose(stats["var"], norm.running_var, atol=1e-4)
    assert int(stats["count"]) == int(norm.num_batches_tracked) == 1


def test_masked_rows_leave_no_trace():
  model = small()
  images = jax.random.uniform(KEY, (6, 16, 16, 3))
  variables = model.init(KEY, images)
  exact, expected = model.apply_train(variables, images[:4], KEY)
  spoiled = images.at[4:].set(1e3)
  mask = jnp.arange(6) < 4
  padded, updated = model.apply_train(variables, spoiled, KEY, mask)
  np.testing.assert_allclose(padded[:4], exact, atol=1e-4)
  for got, want in zip(
    jax.tree.leaves(updated), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rows_are_independent_in_inference():
  model = small()
  images = jax.random.uniform(KEY, (4, 16, 16, 3))
  variables = model.init(KEY, images)
  np.testing.assert_allclose(
    model.apply(variables, images)[1:2],
    model.apply(variables, images[1:2]),
    atol=1e-5,
  )


def test_same_arguments_give_the_same_functions():
  model = models.create("all_cnn", **SMALL)
  assert models.create("all_cnn", **SMALL) is model
  same = {**SMALL, "mean": (0.5, 0.5, 0.5)}
  assert models.create("all_cnn", **same) is model
  for other in (
    {"width": 0.1},
    {"dropout": 0.1},
    {"dtype": "bfloat16"},
    {"is_rematerialised": True},
  ):
    assert models.create("all_cnn", **SMALL, **other) is not model


def test_dropout_is_active_in_training_alone():
  images = jax.random.uniform(KEY, (2, 32, 32, 3))
  plain, model = small(), small(dropout=0.3)
  variables = plain.init(KEY, images)
  np.testing.assert_array_equal(
    model.apply(variables, images), plain.apply(variables, images)
  )
  keys = jax.random.split(KEY, 2)
  first, again, second = (
    model.apply_train(variables, images, key)[0]
    for key in (keys[0], keys[0], keys[1])
  )
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, second)


def test_logits_and_features_in_one_pass():
  model = small()
  images = np.random.default_rng(0).integers(
    0, 256, (5, 16, 16, 3), dtype=np.uint8
  )
  variables = model.init(KEY, jnp.zeros((1, 16, 16, 3)))
  logits, features = inference.predict_both(
    model, variables, images, batch_size=4
  )
  floats = images / np.float32(255)
  np.testing.assert_allclose(logits, model.apply(variables, floats), atol=1e-5)
  np.testing.assert_allclose(
    features, model.features(variables, floats), atol=1e-5
  )

  def flops(fn):
    compiled = jax.jit(fn).lower(variables, floats).compile()
    return compiled.cost_analysis()["flops"]

  both = flops(inference.logits_and_features(model))
  assert both < 1.05 * flops(model.apply)
  none = inference.predict_both(model, variables, images[:0])
  assert [x.shape for x in none] == [(0, 4), features[:0].shape]


def test_prediction_of_a_data_set_equals_apply():
  model = small()
  images = np.random.default_rng(0).integers(
    0, 256, (11, 16, 16, 3), dtype=np.uint8
  )
  variables = model.init(KEY, jnp.zeros((1, 16, 16, 3)))
  predicted = inference.predict(model.apply, variables, images, batch_size=4)
  np.testing.assert_allclose(
    predicted, model.apply(variables, images / np.float32(255)), atol=1e-5
  )
  none = inference.predict(model.apply, variables, images[:0])
  assert none.shape == (0, 4)
  with pytest.raises(ValueError, match="images must be uint8"):
    inference.predict(model.apply, variables, images / 255)


def test_imported_reference_has_this_structure(reference_dir):
  variables = torch_weights.load(
    reference_dir / "original.safetensors", model_name="all_cnn"
  )
  model = small(num_classes=10, num_channels=1, width=0.25, mean=0.5, std=0.5)
  shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 1)))
  assert jax.tree.map(jnp.shape, dict(variables)) == jax.tree.map(
    jnp.shape, dict(shapes)
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_classes": 1}, "num_classes .* got 1"),
    ({"num_classes": 3.5}, "num_classes .* got 3.5"),
    ({"num_channels": 0}, "num_channels .* got 0"),
    ({"width": 0.0}, "width .* got 0.0"),
    ({"width": float("inf")}, "width .* got inf"),
    ({"std": 0.0}, "std .* got 0.0"),
    ({"dropout": -0.1}, "dropout .* got -0.1"),
    ({"dropout": 1.0}, "dropout .* got 1.0"),
    ({"dtype": "bfloat"}, "dtype .* got 'bfloat', did you mean 'bfloat16'"),
    ({"mean": (0.1, 0.2)}, "mean must be finite, one value or 3"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    small(**options)


def test_unknown_model_suggests_the_nearest():
  with pytest.raises(ValueError, match="'allcnn', did you mean 'all_cnn'"):
    models.create("allcnn", **SMALL)


def test_wrong_number_of_channels():
  model = small()
  with pytest.raises(ValueError, match="images must be"):
    model.init(KEY, jnp.zeros((1, 32, 32, 1)))
