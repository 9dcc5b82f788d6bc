import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psg_jax import augment, batches, steps, training
from tests import fakes

KEY = jax.random.key(0)
MODEL = fakes.linear_model(16, 3)


def start(num_classes=3):
  return fakes.linear_variables(np.zeros((16, num_classes)))


def fit(dataset, key=KEY, **options):
  options = {
    "optimizer": training.sgd(0.5),
    "num_epochs": 3,
    "batch_size": 8,
    "show_progress": False,
    **options,
  }
  return training.fit(MODEL, start(), dataset, key, **options)


def test_learns_separable_classes():
  dataset = fakes.blobs(120)
  _, history = fit(dataset, num_epochs=10)
  assert history[-1]["accuracy"] == 1.0
  assert history[-1]["loss"] < 0.2
  np.testing.assert_allclose(history[0]["step_losses"][0], np.log(3), atol=1e-5)
  assert [record["epoch"] for record in history] == list(range(1, 11))
  assert len(history[0]["step_losses"]) == 15


def test_first_step_equals_gradient_descent_by_hand():
  # One batch of all images: softmax is uniform at the start, so the gradient
  # is x^T (1/3 - onehot) / N; weight decay of a zero kernel is zero.
  dataset = fakes.blobs(12)
  variables, _ = fit(
    dataset, optimizer=training.sgd(0.1), num_epochs=1, batch_size=12
  )
  flat = dataset.images.reshape(12, -1) / 255.0
  gradient = flat.T @ (1 / 3 - np.eye(3)[dataset.labels]) / 12
  np.testing.assert_allclose(
    variables["params"]["kernel"], -0.1 * gradient, atol=1e-6
  )


@pytest.mark.parametrize("num_epochs", [1, 4])
def test_one_cycle_is_optax_schedule_of_the_rate(num_epochs):
  dataset = fakes.blobs(50)
  num_steps = num_epochs * 7
  ours, _ = fit(dataset, num_epochs=num_epochs)
  schedule = optax.cosine_onecycle_schedule(num_steps, peak_value=0.5)
  theirs, _ = fit(
    dataset,
    num_epochs=num_epochs,
    optimizer=training.sgd(schedule),
    schedule="constant",
  )
  # The same sums in another order: some roundings of values about 1.
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
  other, _ = fit(dataset, num_epochs=num_epochs, schedule=lambda step: 0.5)
  half, _ = fit(
    dataset,
    num_epochs=num_epochs,
    optimizer=training.sgd(0.25),
    schedule="constant",
  )
  chex.assert_trees_all_close(other, half, rtol=1e-5, atol=1e-6)


def test_one_cycle_ends_at_rest():
  factors = training.schedule_factors("one_cycle", 100)
  assert factors.max() == 1.0
  assert factors.argmax() == 30
  np.testing.assert_allclose(factors[0], 1 / 25, rtol=1e-6)
  assert 0 < factors[-1] < 0.01
  assert (training.schedule_factors("one_cycle", 1) == 1).all()
  assert (training.schedule_factors("constant", 3) == 1).all()


def test_unknown_schedule():
  with pytest.raises(ValueError, match=r"schedule .* got 'cosine'"):
    fit(fakes.blobs(5), schedule="cosine")


def test_sgd_equals_pytorch():
  torch = pytest.importorskip("torch", reason="PyTorch is a development extra")
  rng = np.random.default_rng(0)
  weights = rng.normal(size=5).astype(np.float32)
  gradients = rng.normal(size=(4, 5)).astype(np.float32)
  theirs = torch.nn.Parameter(torch.tensor(weights))
  sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=1e-2)
  optimizer = training.sgd(0.1, weight_decay=1e-2)
  ours = jnp.asarray(weights)
  state = optimizer.init(ours)
  for gradient in gradients:
    theirs.grad = torch.tensor(gradient)
    sgd.step()
    updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
    ours = optax.apply_updates(ours, updates)
  np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


def test_same_seed_same_weights_and_input_is_left_alone():
  dataset = fakes.blobs(50)
  variables = start()
  before = jax.tree.map(np.array, variables)
  options = {
    "optimizer": training.sgd(0.1),
    "num_epochs": 2,
    "batch_size": 16,
    "augment_fn": augment.flip(),
    "show_progress": False,
  }
  first, _ = training.fit(MODEL, variables, dataset, KEY, **options)
  again, _ = training.fit(MODEL, variables, dataset, KEY, **options)
  other, _ = training.fit(
    MODEL, variables, dataset, jax.random.key(1), **options
  )
  chex.assert_trees_all_equal(first, again)
  chex.assert_trees_all_equal(variables, before)
  assert np.any(first["params"]["kernel"] != other["params"]["kernel"])


def test_augmentation_reaches_the_steps():
  dataset = fakes.blobs(50)
  plain, _ = fit(dataset)
  flipped, _ = fit(dataset, augment_fn=augment.flip())
  assert np.any(plain["params"]["kernel"] != flipped["params"]["kernel"])


def test_padding_leaves_batch_statistics_alone():
  dataset = fakes.blobs(3, size=8)
  model = fakes.small_cnn(
    num_classes=3, num_channels=1, width=0.02, mean=0.5, std=0.5
  )
  variables = model.init(KEY, jnp.zeros((1, 8, 8, 1)))
  options = {"num_epochs": 1, "show_progress": False}
  exact, _ = training.fit(
    model, variables, dataset, KEY, batch_size=3, **options
  )
  padded, _ = training.fit(
    model, variables, dataset, KEY, batch_size=8, **options
  )
  # Sums of another batch size may differ in the last bits.
  chex.assert_trees_all_close(exact, padded, atol=1e-5)


def test_resumed_state_is_left_alone():
  dataset = fakes.blobs(20)
  optimizer = training.sgd(0.1)
  state = training.init_state(start(), optimizer, KEY)
  first, _ = fit(dataset, optimizer=optimizer, state=state)
  again, _ = fit(dataset, optimizer=optimizer, state=state)
  chex.assert_trees_all_equal(first, again)


def test_every_image_counts_once_an_epoch():
  rows, is_real = batches.shuffled_rows(KEY, 21, 8)
  assert rows.shape == (3, 8)
  np.testing.assert_array_equal(np.sort(rows[is_real]), np.arange(21))
  weights = batches.mixed(KEY, 0, 21, 8).weights
  np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(weights[2, :5], 0.2, atol=1e-6)
  np.testing.assert_array_equal(weights[2, 5:], 0)


def test_padding_does_not_move_the_model():
  # Three images in a batch of eight equal three in a batch of three.
  dataset = fakes.blobs(3)
  padded, _ = fit(dataset, batch_size=8)
  exact, _ = fit(dataset, batch_size=3)
  chex.assert_trees_all_close(padded, exact, atol=1e-6)


def test_resuming_gives_the_same_weights():
  dataset = fakes.blobs(50)
  states = []

  def keep(state, record):
    del record
    states.append(jax.tree.map(jnp.copy, state))

  whole, history = fit(dataset, num_epochs=4, callback=keep)
  resumed, rest = fit(dataset, num_epochs=4, state=states[1])
  chex.assert_trees_all_equal(whole, resumed)
  assert [record["epoch"] for record in rest] == [3, 4]
  assert rest[-1]["loss"] == history[-1]["loss"]


def test_one_compilation_for_all_epochs():
  before = steps.num_programs()
  # Forty steps are cut into calls, and the last is filled up.
  fit(fakes.blobs(41), batch_size=1, optimizer=training.sgd(0.123))
  assert steps.num_programs() == before + 1


def test_any_optax_optimizer():
  _, history = fit(fakes.blobs(60), optimizer=optax.adam(0.05), num_epochs=8)
  assert history[-1]["accuracy"] > 0.95


def test_divergence_names_the_step():
  optimizer = optax.chain(
    optax.scale_by_schedule(lambda step: jnp.where(step == 4, jnp.nan, -0.1))
  )
  with pytest.raises(FloatingPointError, match="not finite at step 6"):
    fit(fakes.blobs(64), optimizer=optimizer)
  with pytest.raises(FloatingPointError, match="not finite after step 5"):
    fit(fakes.blobs(40), optimizer=optimizer, num_epochs=1)


def test_soft_targets_cross_entropy():
  logits = jnp.log(jnp.array([[0.2, 0.3, 0.5]]))
  np.testing.assert_allclose(
    training.cross_entropy(logits, jnp.array([2])), 0.693147, atol=1e-6
  )
  # -(0.5 ln 0.2 + 0.5 ln 0.5)
  np.testing.assert_allclose(
    training.cross_entropy(logits, jnp.array([[0.5, 0.0, 0.5]])),
    1.151293,
    atol=1e-6,
  )


def test_augmentation_known_answers():
  image = jnp.arange(16.0).reshape(1, 4, 4, 1) / 16
  images = jnp.tile(image, (64, 1, 1, 1))
  flipped = np.asarray(augment.flip()(KEY, images))
  is_flipped = np.array([np.array_equal(x, image[0, :, ::-1]) for x in flipped])
  is_same = np.array([np.array_equal(x, image[0]) for x in flipped])
  assert np.all(is_flipped ^ is_same)
  assert 16 < is_flipped.sum() < 48
  cut = np.asarray(augment.crop(1)(KEY, images))
  padded = np.pad(np.asarray(image[0, :, :, 0]), 1)
  windows = {
    padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)
  }
  found = {np.ascontiguousarray(x[..., 0]).tobytes() for x in cut}
  assert found == windows
  both = augment.chain(augment.crop(1), augment.flip())
  assert both(KEY, images).shape == images.shape
  assert augment.crop(1) is augment.crop(1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_epochs": 0}, "num_epochs must be .* got 0"),
    ({"batch_size": -1}, "batch_size must be .* got -1"),
    ({"key": jax.random.PRNGKey(0)}, "key must be made by jax.random.key"),
    ({"dataset": fakes.blobs(4).take([])}, "dataset must not be empty"),
    (
      {"dataset": fakes.blobs(40, num_classes=4)},
      r"labels must be in \[0, 3\)",
    ),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    fit(**{"dataset": fakes.blobs(8), **options})


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"learning_rate": 0.0}, "learning_rate .* got 0.0"),
    ({"learning_rate": float("nan")}, "learning_rate .* got nan"),
    ({"learning_rate": 0.1, "momentum": -1.0}, "momentum .* got -1.0"),
    ({"learning_rate": 0.1, "momentum": 1.0}, "momentum .* got 1.0"),
    ({"learning_rate": 0.1, "weight_decay": -1.0}, "weight_decay .* got -1.0"),
  ],
)
def test_bad_rates(options, message):
  with pytest.raises(ValueError, match=message):
    training.sgd(**options)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"images": np.zeros((2, 4, 4), np.uint8)}, r"images .* uint8 \[2, 4, 4\]"),
    ({"images": np.zeros((2, 4, 4, 1))}, "images .* got float64"),
    ({"labels": np.array([0])}, "got 1 labels for 2 images"),
    ({"labels": np.array([0, 3])}, r"in \[0, 3\), got 3 at row 1"),
    ({"labels": np.array([0, -1])}, r"in \[0, 3\), got -1 at row 1"),
    ({"labels": np.array([0.0, 1.0])}, "labels must be integers"),
    ({"ids": np.array(["a"])}, "ids must be as many as images"),
  ],
)
def test_bad_datasets(changes, message):
  from psg_jax import types

  good = {
    "images": np.zeros((2, 4, 4, 1), np.uint8),
    "labels": np.array([0, 1]),
    "class_names": ("a", "b", "c"),
  }
  with pytest.raises(ValueError, match=message):
    types.Dataset(**{**good, **changes})


@pytest.fixture(scope="module")
def small_cnn():
  model = fakes.small_cnn(
    num_classes=3, num_channels=1, width=0.05, mean=0.5, std=0.5
  )
  return model, model.init(KEY, jnp.zeros((1, 4, 4, 1)))


def fit_cnn(small_cnn, variables=None, **options):
  model, own = small_cnn
  return training.fit(
    model,
    own if variables is None else variables,
    fakes.blobs(12),
    KEY,
    **{
      "num_epochs": 1,
      "batch_size": 8,
      "show_progress": False,
      **options,
    },
  )[0]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_wide_types_change_nothing(small_cnn, num_parts):
  plain = fit_cnn(small_cnn, num_parts=num_parts)
  jax.config.update("jax_enable_x64", True)
  try:
    wide = fit_cnn(small_cnn, num_parts=num_parts)
  finally:
    jax.config.update("jax_enable_x64", False)
  chex.assert_trees_all_equal_dtypes(wide, plain)
  # The order is drawn with other integers there: the same kind of result only.
  assert np.isfinite(wide["params"]["head"]["kernel"]).all()


def test_other_mappings_and_types(small_cnn):
  """FrozenDicts, and a network that answers in other types and mappings."""
  model, variables = small_cnn

  def apply_train(variables, images, key, mask=None):
    logits, moved = model.apply_train(variables, images, key, mask)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), moved["batch_stats"])
    return logits.astype(jnp.bfloat16), flax.core.freeze({"batch_stats": half})

  odd = (model._replace(apply_train=apply_train), variables)
  frozen = flax.core.freeze(variables)
  trained = fit_cnn(odd, frozen)
  assert type(trained["params"]) is type(trained["batch_stats"]) is dict
  chex.assert_trees_all_equal_shapes_and_dtypes(trained, variables)
  same = fit_cnn(small_cnn, frozen)
  chex.assert_trees_all_equal(same, fit_cnn(small_cnn))


@pytest.mark.parametrize(
  ("variables", "found"),
  [
    ({"w": jnp.zeros(3), "b": jnp.zeros(3)}, "the keys w, b"),
    ({}, "the keys "),
    (jnp.zeros(3), "a ArrayImpl"),
  ],
)
def test_variables_without_params(variables, found):
  with pytest.raises(ValueError, match=f'with "params".* got {found}'):
    training.fit(MODEL, variables, fakes.blobs(8), KEY, num_epochs=1)


def test_networks_without_logits():
  one = MODEL._replace(apply=lambda v, x: fakes.linear_apply(v, x)[:, :1])
  with pytest.raises(ValueError, match=r"must return logits.* \[1, 1\]"):
    training.fit(one, start(), fakes.blobs(8), KEY, num_epochs=1)
