import dataclasses
import functools
import inspect
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psg_jax import (
  baselines,
  batches,
  inference,
  metrics,
  optimizers,
  parallel,
  steps,
  streaming,
  training,
  types,
  unlearning,
)
from psg_jax.baselines import (
  bad_teacher,
  boundary_expanding,
  boundary_shrink,
  finetune,
  fisher,
  gradient_ascent,
  l1_sparse,
  neggrad,
  random_labels,
  retrain,
  salun,
  scrub,
  ssd,
  unsir,
)
from tests import fakes, tolerances

KEY = jax.random.key(0)
MODEL = fakes.linear_model(16, 3)
# What a method needs on a linear model of three classes, beside its defaults.
NEEDS = {
  "psg": {"num_steps": 20, "step_size": 0.05, "num_epochs": 1},
  "psg_hard": {"num_steps": 20, "step_size": 0.05, "num_epochs": 1},
  "psg_soft": {"num_steps": 20, "step_size": 0.05, "num_epochs": 1},
  "psg_released": {"model_mean": 0.5, "model_std": 0.5, "num_epochs": 1},
  "scrub_r": {"reference_error": 1.0},
  "ssd": {"selection_weight": 1.0},
  "cf_k": {"layers": ("kernel",)},
  "eu_k": {"layers": ("kernel",)},
  "trew": {"layer": "kernel"},
  "msg": {"layers": ("kernel",)},
  "bias_shift": {"layers": ("bias",)},
  "regun": {"held_out": fakes.blobs(30, seed=5)},
}


@pytest.fixture(scope="module")
def trained():
  """A linear model that knows three separable classes, not too surely."""
  dataset = fakes.blobs(120)
  variables, _ = training.fit(
    MODEL,
    fakes.linear_variables(np.zeros((16, 3))),
    dataset,
    KEY,
    optimizer=training.sgd(0.1),
    num_epochs=5,
    batch_size=16,
    schedule="constant",
    show_progress=False,
  )
  return variables, fakes.split_class(dataset)


def run(fn, trained, key=KEY, **options):
  variables, split = trained
  return fn(MODEL, variables, split, key, **{"show_progress": False, **options})


def accuracy(variables, dataset):
  logits = inference.predict(MODEL.apply, variables, dataset.images)
  return np.mean(logits.argmax(1) == dataset.labels)


def flat(dataset):
  return dataset.images.reshape(len(dataset), -1) / 255.0


def logits_of(variables, dataset):
  params = jax.tree.map(np.asarray, variables["params"])
  return flat(dataset) @ params["kernel"] + params["bias"]


def softmax(logits):
  shifted = np.exp(logits - logits.max(1, keepdims=True))
  return shifted / shifted.sum(1, keepdims=True)


def ce_gradient(kernel, bias, dataset, targets=None):
  """The gradient of the mean cross-entropy, by hand."""
  targets = np.eye(3)[dataset.labels] if targets is None else targets
  errors = softmax(flat(dataset) @ kernel + bias) - targets
  return flat(dataset).T @ errors / len(dataset), errors.mean(0)


def kernel_of(variables):
  return np.asarray(variables["params"]["kernel"])


@pytest.mark.parametrize("name", list(baselines.METHODS))
def test_every_method_keeps_the_contract(trained, name):
  variables, _ = trained
  method = baselines.find(name)
  before = jax.tree.map(np.array, variables)
  seen = []
  options = {"batch_size": 32, **NEEDS.get(name, {})}
  parameters = inspect.signature(method.fn).parameters
  if "num_epochs" in baselines.parameters(name):
    options["num_epochs"] = 2
  output = run(
    method.fn,
    trained,
    callback=lambda state, record: seen.append(
      (record["epoch"], jax.tree.map(np.array, state.variables))
    ),
    **options,
  )
  assert isinstance(output, baselines.Output)
  chex.assert_trees_all_equal(variables, before)
  chex.assert_trees_all_equal_shapes_and_dtypes(output.variables, variables)
  epochs = list(range(1, len(output.history) + 1))
  assert [record["epoch"] for record in output.history] == epochs
  assert [epoch for epoch, _ in seen] == epochs
  assert all(record["seconds"] > 0 for record in output.history)
  if name != "scrub_r":
    chex.assert_trees_all_equal(seen[-1][1], output.variables)
  # A rate of 1e-5, and a bias alone.
  if name not in ("boundary_shrink", "psg_released", "bias_shift"):
    assert np.any(kernel_of(output.variables) != kernel_of(variables))
  assert list(parameters)[:4] == ["model", "variables", "split", "key"]
  assert all(
    x.kind in (x.KEYWORD_ONLY, x.VAR_KEYWORD)
    for x in list(parameters.values())[4:]
  )


TRAINING = [
  name
  for name in baselines.METHODS
  # SCRUB+R needs the models of all passes.
  if "state" in baselines.parameters(name) and name != "scrub_r"
]


@pytest.mark.parametrize("name", TRAINING)
def test_every_method_goes_on_where_it_was(trained, name):
  states = []
  options = {
    "batch_size": 32,
    "num_epochs": 3,
    "optimizer": training.sgd(0.05),
    **NEEDS.get(name, {}),
  }
  fn = baselines.find(name).fn
  whole = run(
    fn,
    trained,
    callback=lambda state, _: states.append(jax.tree.map(jnp.copy, state)),
    **options,
  )
  for number, state in enumerate(states[:-1], 1):
    resumed = run(fn, trained, state=state, **options)
    chex.assert_trees_all_equal(resumed.variables, whole.variables)
    epochs = [record["epoch"] for record in resumed.history]
    assert epochs == list(range(number + 1, len(states) + 1))


# Some draw weights anew before they train.
@pytest.mark.parametrize(
  "name", [x for x in TRAINING if x not in ("retrain", "eu_k", "msg")]
)
def test_every_method_leaves_alone_what_is_not_trainable(trained, name):
  variables, _ = trained
  kernel = kernel_of(variables)
  mask = np.arange(kernel.size).reshape(kernel.shape) % 2 == 0
  trainable = {"params": {"kernel": mask, "bias": False}}
  options = {
    "num_epochs": 2,
    # Weight decay alone would move all weights.
    "optimizer": training.sgd(0.1, weight_decay=0.1),
    **NEEDS.get(name, {}),
  }
  if name == "boundary_expanding":
    shadow = {"kernel": True, "bias": True}
    trainable = {"params": {"network": trainable["params"], "shadow": shadow}}
  after = run(baselines.find(name).fn, trained, trainable=trainable, **options)
  bias = variables["params"]["bias"]
  np.testing.assert_array_equal(after.variables["params"]["bias"], bias)
  is_moved = kernel_of(after.variables) != kernel
  assert not is_moved[~mask].any()
  assert is_moved[mask].any()


@pytest.mark.parametrize("name", TRAINING)
def test_none_stands_for_a_methods_own_value(trained, name):
  options = {"num_epochs": 1, **NEEDS.get(name, {})}
  options.pop("optimizer", None)
  fn = baselines.find(name).fn
  default, none = (
    run(fn, trained, **options, **given).variables
    for given in ({}, {"optimizer": None})
  )
  chex.assert_trees_all_equal(none, default)


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in TRAINING if x != "unsir"])
def test_every_method_accumulates_gradients(trained, name):
  options = {
    "batch_size": 16,
    "num_epochs": 2,
    "optimizer": training.sgd(0.05),
    **NEEDS.get(name, {}),
  }
  fn = baselines.find(name).fn
  whole, parts = (
    run(fn, trained, num_parts=n, **options).variables for n in (1, 4)
  )
  # Sums of 16 in another order, over at most 30 steps.
  chex.assert_trees_all_close(parts, whole, atol=1e-5)


def test_trainable_must_be_like_the_variables(trained):
  with pytest.raises(ValueError, match=r"trainable must be trees like"):
    run(finetune.finetune, trained, trainable={"params": {"kernel": True}})
  with pytest.raises(ValueError, match=r"num_parts must be 1 .* got 2"):
    run(unsir.unsir, trained, num_parts=2)
  with pytest.raises(ValueError, match=r"state must be None"):
    run(scrub.scrub_r, trained, reference_error=1.0, state=trained)


def test_psg_with_soft_labels_is_less_sure_of_forget_images(trained):
  _, split = trained
  options = {
    **NEEDS["psg"],
    "num_epochs": 20,
    "schedule": "constant",
    "optimizer": training.sgd(0.1),
  }
  images = split.forget.images / np.float32(255)
  hard, soft = (
    np.asarray(MODEL.apply(run(fn, trained, **options).variables, images))
    for fn in (baselines.find("psg_hard").fn, baselines.find("psg_soft").fn)
  )
  label = split.forget.labels[0]
  assert not np.any(hard.argmax(1) == label)
  assert not np.any(soft.argmax(1) == label)
  assert metrics.entropies(soft).mean() > metrics.entropies(hard).mean() + 0.05


def test_find_names_the_nearest():
  assert baselines.find("scrub").title == "SCRUB"
  assert list(baselines.METHODS) == [x.name for x in baselines.METHODS.values()]
  with pytest.raises(ValueError, match="'scrubb', did you mean 'scrub'"):
    baselines.find("scrubb")


def test_conformance_retrain_starts_from_a_fresh_initialisation(trained):
  variables, split = trained
  options = {"num_epochs": 8, "optimizer": training.sgd(0.5), "batch_size": 16}
  output = run(retrain.retrain, trained, **options)
  other = jax.tree.map(lambda x: x + 100.0, variables)
  again = run(retrain.retrain, (other, split), **options)
  chex.assert_trees_all_equal(output.variables, again.variables)
  init_key, fit_key = jax.random.split(KEY)
  direct, _ = training.fit(
    MODEL,
    MODEL.init(init_key, jnp.zeros((1, 4, 4, 1))),
    split.retain,
    fit_key,
    show_progress=False,
    **options,
  )
  chex.assert_trees_all_equal(output.variables, direct)
  assert accuracy(output.variables, split.forget) == 0
  assert accuracy(output.variables, split.retain) > 0.95


def test_finetune_equals_training_on_the_retain_set(trained):
  variables, split = trained
  spoiled = types.Dataset(
    images=255 - split.forget.images,
    labels=split.forget.labels,
    class_names=split.forget.class_names,
  )
  output = run(
    finetune.finetune, (variables, split._replace(forget=spoiled)), num_epochs=1
  )
  one_batch = run(
    finetune.finetune,
    trained,
    num_epochs=1,
    batch_size=len(split.retain),
  )
  params = variables["params"]
  gradient, _ = ce_gradient(
    np.asarray(params["kernel"]), np.asarray(params["bias"]), split.retain
  )
  np.testing.assert_allclose(
    kernel_of(one_batch.variables),
    kernel_of(variables) - 0.04 * gradient,
    atol=1e-6,
  )
  assert accuracy(output.variables, split.retain) > 0.95
  assert output.history[0]["retain_accuracy"] > 0.9
  assert "forget_loss" not in output.history[0]


def test_gradient_ascent_first_step_by_hand_and_forgets(trained):
  variables, split = trained
  params = jax.tree.map(np.asarray, variables["params"])
  gradient, of_bias = ce_gradient(
    params["kernel"], params["bias"], split.forget
  )
  one = run(
    gradient_ascent.gradient_ascent,
    trained,
    num_epochs=1,
    optimizer=optax.sgd(0.3),
  ).variables["params"]
  np.testing.assert_allclose(
    one["kernel"], params["kernel"] + 0.3 * gradient, atol=1e-6
  )
  np.testing.assert_allclose(
    one["bias"], params["bias"] + 0.3 * of_bias, atol=1e-6
  )
  many = run(
    gradient_ascent.gradient_ascent,
    trained,
    num_epochs=20,
    batch_size=16,
    optimizer=training.sgd(0.1),
  )
  assert accuracy(many.variables, split.forget) == 0
  losses = [record["forget_loss"] for record in many.history]
  assert losses[-1] > losses[0]


def test_neggrad_step_by_hand(trained):
  variables, split = trained
  small = split._replace(forget=split.forget.take(np.arange(30)))
  options = {
    "num_epochs": 1,
    "batch_size": len(split.retain),
    "optimizer": optax.sgd(0.2),
  }
  output = run(
    neggrad.neggrad_plus, (variables, small), retain_share=0.75, **options
  )
  kernel, bias = (
    np.asarray(variables["params"][x]) for x in ("kernel", "bias")
  )
  up, _ = ce_gradient(kernel, bias, small.forget)
  down, _ = ce_gradient(kernel, bias, small.retain)
  np.testing.assert_allclose(
    kernel_of(output.variables),
    kernel - 0.2 * (0.75 * down - 0.25 * up),
    atol=1e-6,
  )
  # Every retain image counts, however the batches fall.
  record = output.history[0]
  loss = -np.log(softmax(logits_of(variables, small.retain)))
  expected = loss[np.arange(len(loss)), small.retain.labels].mean()
  assert record["retain_loss"] == pytest.approx(expected, rel=1e-4)
  with_all = run(neggrad.neggrad, trained, retain_share=1.0, num_epochs=1)
  assert with_all.history[0]["step_losses"][0] > 0


def test_neggrad_forgets_and_keeps(trained):
  _, split = trained
  output = run(
    neggrad.neggrad_plus,
    trained,
    retain_share=0.7,
    num_epochs=7,
    batch_size=16,
    optimizer=training.sgd(0.1),
  )
  assert accuracy(output.variables, split.forget) == 0
  assert accuracy(output.variables, split.retain) > 0.95


def test_random_labels_are_uniform_and_never_the_true_one(trained):
  labels = np.repeat(np.arange(4), 3000)
  drawn = random_labels.other_labels(KEY, labels, 4)
  assert drawn.dtype == np.int32
  assert not np.any(drawn == labels)
  counts = np.stack(
    [np.bincount(drawn[labels == i], minlength=4) for i in range(4)]
  )
  # Four standard deviations of a binomial of 3000 and 1/3.
  np.testing.assert_allclose(
    counts, 1000 * (1 - np.eye(4)), atol=4 * np.sqrt(3000 * 2 / 9)
  )
  with pytest.raises(ValueError, match=r"num_classes .* got 1"):
    random_labels.other_labels(KEY, labels * 0, 1)
  _, split = trained
  output = run(
    random_labels.random_labels,
    trained,
    batch_size=16,
    optimizer=training.sgd(0.2),
  )
  assert accuracy(output.variables, split.forget) < 0.1
  assert accuracy(output.variables, split.retain) > 0.95


def test_l1_sparse_penalty_fades_and_acts(trained):
  variables, split = trained
  options = {"penalty": 0.1, "num_plain_epochs": 1, "num_epochs": 5}
  output = run(l1_sparse.l1_sparse, trained, **options)
  np.testing.assert_allclose(
    [record["penalty"] for record in output.history],
    [0.1, 0.075, 0.05, 0.025, 0.0],
    rtol=1e-6,
  )
  kernel, bias = (
    np.asarray(variables["params"][x]) for x in ("kernel", "bias")
  )
  gradient, _ = ce_gradient(kernel, bias, split.retain)
  one = run(
    l1_sparse.l1_sparse,
    trained,
    penalty=0.3,
    num_epochs=1,
    optimizer=optax.sgd(0.1),
  )
  np.testing.assert_allclose(
    kernel_of(one.variables),
    kernel - 0.1 * (gradient + 0.3 * np.sign(kernel)),
    atol=1e-6,
  )


def scrub_by_hand(variables, split, *, rate, gamma, alpha, temperature):
  """Two passes of one max and one min step each."""
  kernel, bias = (
    np.asarray(variables["params"][x]) for x in ("kernel", "bias")
  )

  def distance_gradient(dataset):
    teacher = softmax(logits_of(variables, dataset) / temperature)
    student = softmax((flat(dataset) @ kernel + bias) / temperature)
    errors = temperature * (student - teacher)
    return flat(dataset).T @ errors / len(dataset), errors.mean(0)

  for _ in range(2):
    up = distance_gradient(split.forget)
    kernel, bias = kernel + rate * up[0], bias + rate * up[1]
    down = ce_gradient(kernel, bias, split.retain)
    near = distance_gradient(split.retain)
    kernel = kernel - rate * (gamma * down[0] + alpha * near[0])
    bias = bias - rate * (gamma * down[1] + alpha * near[1])
  return {"params": {"kernel": kernel, "bias": bias}}


def test_conformance_scrub_teacher_is_not_its_student(trained):
  variables, split = trained
  rate, weights = 0.5, {"retain_weight": 0.9, "teacher_weight": 0.4}
  output = run(
    scrub.scrub,
    trained,
    num_epochs=2,
    num_max_epochs=2,
    temperature=2.0,
    batch_size=200,
    optimizer=optax.sgd(rate),
    **weights,
  )
  expected = scrub_by_hand(
    variables, split, rate=rate, gamma=0.9, alpha=0.4, temperature=2.0
  )
  chex.assert_trees_all_close(output.variables, expected, atol=1e-5)
  first, second = output.history
  # A student that is its own teacher is never away from it: their logits are
  # the same but for the roundings of 16 products and sums, and their
  # log-probabilities but for those of three exponentials, in two programs. The
  # divergence averages such differences.
  temperature = 2.0
  magnitude = np.abs(logits_of(variables, split.forget)).max() / temperature
  zero = temperature**2 * tolerances.float32(16 + 3 + 3, magnitude)
  assert abs(first["forget_distance"]) < zero
  assert second["forget_distance"] > zero
  assert second["retain_distance"] > zero


@pytest.mark.parametrize("fn", [scrub.scrub, bad_teacher.bad_teacher])
def test_conformance_teachers_see_images_as_the_student_does(trained, fn):
  variables, split = trained
  mirrored = types.Split(
    *(dataclasses.replace(x, images=x.images[:, :, ::-1]) for x in split)
  )
  options = {"num_epochs": 2, "optimizer": optax.sgd(0.5), "batch_size": 40}
  augmented = run(
    fn, trained, augment_fn=lambda key, images: images[:, :, ::-1], **options
  )
  expected = run(fn, (variables, mirrored), **options)
  plain = run(fn, trained, **options)
  chex.assert_trees_all_close(
    augmented.variables, expected.variables, atol=1e-5
  )
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(augmented.variables, plain.variables, atol=1e-2)


def test_scrub_forgets_in_max_passes_and_decays_its_rate(trained):
  _, split = trained
  output = run(
    scrub.scrub,
    trained,
    num_epochs=6,
    num_max_epochs=5,
    batch_size=16,
    optimizer=training.sgd(0.2),
  )
  assert accuracy(output.variables, split.forget) < 0.1
  assert accuracy(output.variables, split.retain) > 0.95
  has_max = ["forget_distance" in record for record in output.history]
  assert has_max == [True] * 5 + [False]
  rate = scrub.decayed(0.5, (4, 6))
  np.testing.assert_allclose(
    [rate(step) for step in (0, 3, 4, 5, 6, 9)],
    [0.5, 0.5, 0.05, 0.05, 0.005, 0.005],
    rtol=1e-6,
  )


def test_scrub_r_goes_back_to_the_pass_nearest_the_reference(trained):
  _, split = trained
  options = {
    "num_epochs": 6,
    "num_max_epochs": 5,
    "batch_size": 16,
    "optimizer": training.sgd(0.1),
  }
  found = []
  run(
    scrub.scrub,
    trained,
    callback=lambda state, _: found.append(
      jax.tree.map(np.array, state.variables)
    ),
    **options,
  )
  errors = [1 - accuracy(x, split.forget) for x in found]
  middle = next(x for x in errors if 0 < x < 1)
  output = run(scrub.scrub_r, trained, reference_error=middle, **options)
  chosen = min(i for i, x in enumerate(errors) if np.isclose(x, middle))
  chex.assert_trees_all_equal(output.variables, found[chosen])
  assert [x["is_chosen"] for x in output.history] == [
    i == chosen for i in range(6)
  ]
  np.testing.assert_allclose(
    [x["forget_error"] for x in output.history], errors, atol=1e-6
  )
  with pytest.raises(ValueError, match="either validation or reference_error"):
    run(scrub.scrub_r, trained)


def test_bad_teacher_learns_from_two_teachers(trained):
  variables, split = trained
  output = run(
    bad_teacher.bad_teacher,
    trained,
    retain_fraction=1.0,
    num_epochs=150,
    batch_size=40,
    optimizer=training.sgd(0.5, weight_decay=0.0),
  )
  incompetent = MODEL.init(jax.random.split(KEY, 4)[0], None)
  original = softmax(logits_of(variables, split.retain))
  random = softmax(logits_of(incompetent, split.forget))
  student = [softmax(logits_of(output.variables, part)) for part in split]
  # Both teachers cannot be met at once by a linear student, but nearly.
  assert np.abs(student[0] - random).mean() < 0.12
  assert np.abs(student[1] - original).mean() < 0.12
  assert output.history[-1]["retain_accuracy"] > 0.95


def test_bad_teacher_loss_is_zero_for_the_original_on_the_retain_set(trained):
  record = run(
    bad_teacher.bad_teacher,
    trained,
    num_epochs=1,
    optimizer=optax.sgd(1e-9),
    temperature=3.0,
  ).history[0]
  assert record["retain_loss"] == pytest.approx(0, abs=1e-6)
  assert record["retain_accuracy"] == 1
  assert record["forget_loss"] > 0.01


def test_conformance_masked_weights_keep_every_bit(trained):
  variables, split = trained
  output = run(
    salun.salun,
    trained,
    salient_fraction=0.25,
    batch_size=16,
    optimizer=training.sgd(0.1, momentum=0.9, weight_decay=0.1),
  )
  kernel, bias = (
    np.asarray(variables["params"][x]) for x in ("kernel", "bias")
  )
  gradients = ce_gradient(kernel, bias, split.forget)
  sizes = np.abs(np.concatenate([gradients[1], gradients[0].ravel()]))
  count = round(0.25 * sizes.size)
  is_salient = sizes >= np.sort(sizes)[-count]
  before = np.concatenate([bias, kernel.ravel()])
  after = np.concatenate(
    [np.ravel(output.variables["params"][x]) for x in ("bias", "kernel")]
  )
  assert is_salient.sum() == count
  np.testing.assert_array_equal(
    after.view(np.int32) != before.view(np.int32), is_salient
  )
  assert output.history[0]["saliency_seconds"] > 0
  assert output.history[-1]["forget_accuracy"] > 0.3


def test_ssd_by_hand(trained):
  variables, split = trained
  errors = [
    softmax(logits_of(variables, part)) - np.eye(3)[part.labels]
    for part in split
  ]
  importances = []
  for part, error in zip(split, errors, strict=True):
    per_image = flat(part)[:, :, None] * error[:, None, :]
    importances.append(np.square(per_image).mean(0))
  share = len(split.forget) / 120
  whole = share * importances[0] + (1 - share) * importances[1]
  alpha = float(np.median(importances[0] / whole))
  is_chosen = importances[0] > alpha * whole
  factor = np.minimum(0.5 * whole / importances[0], 1)
  kernel = kernel_of(variables)
  output = run(
    ssd.ssd, trained, selection_weight=alpha, dampening=0.5, batch_size=16
  )
  np.testing.assert_allclose(
    kernel_of(output.variables),
    np.where(is_chosen, factor * kernel, kernel),
    rtol=1e-4,
  )
  assert 0 < is_chosen.sum() < kernel.size
  nothing = run(ssd.ssd, trained, selection_weight=1e9)
  chex.assert_trees_all_equal(nothing.variables, variables)
  assert nothing.history[0]["num_dampened"] == 0


def test_fisher_noise_has_the_deviation_of_the_formula(trained):
  variables, split = trained
  p = softmax(logits_of(variables, split.retain))
  # The Fisher information of a softmax regression, known in closed form.
  information = np.square(flat(split.retain)).T @ (p * (1 - p)) / len(p)
  moves = []
  for scale, power, limit in (
    (1e-4, 1.0, 1e9),
    (4e-4, 1.0, 1e9),
    (1e-4, 0.5, 1e9),
    (1e-4, 1.0, 1e-3),
  ):
    output = run(
      fisher.fisher,
      trained,
      noise_scale=scale,
      power=power,
      max_inverse=limit,
      batch_size=10,
    )
    move = kernel_of(output.variables) - kernel_of(variables)
    inverse = np.minimum((information + 1e-8) ** -power, limit)
    moves.append(move / np.sqrt(scale * inverse))
  # The same draws, so the standardised noise is the same but for rounding.
  for move in moves[1:3]:
    np.testing.assert_allclose(move, moves[0], atol=5e-3)
  np.testing.assert_allclose(moves[3], moves[0], atol=0.05)
  # The mean square of 48 standard normals, within four deviations.
  assert abs(np.square(moves[0]).mean() - 1) < 4 * np.sqrt(2 / 48)


def test_unsir_noise_errs_and_repair_restores(trained):
  variables, split = trained
  labels = jnp.zeros(8, jnp.int32)
  make = functools.partial(
    unsir.maximise_error,
    MODEL.apply,
    optimizers.adam(0.1),
    variables,
    KEY,
    labels,
    image_shape=(4, 4, 1),
  )

  def loss(images):
    logits = MODEL.apply(variables, images)
    return float(training.cross_entropy(logits, labels).mean())

  start = make(jnp.float32(0.0), num_steps=0)
  assert loss(make(jnp.float32(0.0), num_steps=40)) > loss(start) + 3
  # The penalty draws the noise to grey.
  tame = make(jnp.float32(10.0), num_steps=200)
  assert np.abs(tame - 0.5).mean() < 0.1 < np.abs(start - 0.5).mean()
  output = run(
    unsir.unsir,
    trained,
    retain_fraction=1.0,
    batch_size=16,
    num_impair_epochs=2,
    num_epochs=3,
  )
  phases = [record["phase"] for record in output.history]
  assert phases == ["impair"] * 2 + ["repair"] * 3
  assert accuracy(output.variables, split.retain) > 0.95
  assert output.history[0]["noise_seconds"] > 0
  # No forget image is used.
  spoiled = split._replace(forget=split.forget.take([0, 1]))
  again = run(
    unsir.unsir,
    (variables, spoiled),
    retain_fraction=1.0,
    batch_size=16,
    num_impair_epochs=2,
    num_epochs=3,
  )
  chex.assert_trees_all_equal(output.variables, again.variables)


def test_boundary_shrink_labels_are_those_of_one_step(trained):
  variables, split = trained
  kernel = kernel_of(variables)
  p = softmax(logits_of(variables, split.forget))
  gradient = (p - np.eye(3)[split.forget.labels]) @ kernel.T
  moved = np.clip(flat(split.forget) + 0.3 * np.sign(gradient), 0, 1)
  moved = np.round(moved * 255) / 255
  bias = np.asarray(variables["params"]["bias"])
  targets = (moved @ kernel + bias).argmax(1)
  assert len(np.unique(targets)) > 1
  options = {"num_epochs": 2, "batch_size": 64, "show_progress": False}
  optimizer = training.sgd(0.2)
  output = run(
    boundary_shrink.boundary_shrink,
    trained,
    step_size=0.3,
    optimizer=optimizer,
    **options,
  )
  state, _ = unlearning.update(
    MODEL,
    variables,
    split,
    targets,
    jax.random.split(KEY)[1],
    optimizer=optimizer,
    retain_weight=0.0,
    **options,
  )
  chex.assert_trees_all_close(output.variables, state.variables, atol=1e-6)


def test_boundary_expanding_step_by_hand_and_pruned(trained):
  variables, split = trained
  widened = boundary_expanding.widen(
    MODEL, variables, split, jax.random.split(KEY, 3)[0]
  )
  shadow = jax.tree.map(np.asarray, widened["params"]["shadow"])
  inputs = flat(split.forget)
  extra = inputs @ shadow["kernel"] + shadow["bias"]
  p = softmax(np.c_[logits_of(variables, split.forget), extra])
  one = run(
    boundary_expanding.boundary_expanding,
    trained,
    num_epochs=1,
    optimizer=optax.sgd(0.3),
  )
  np.testing.assert_allclose(
    kernel_of(one.variables),
    kernel_of(variables) - 0.3 * inputs.T @ p[:, :3] / len(p),
    atol=1e-6,
  )
  many = run(
    boundary_expanding.boundary_expanding,
    trained,
    num_epochs=30,
    batch_size=16,
    optimizer=training.sgd(0.1),
  )
  assert many.history[-1]["forget_accuracy"] == 1
  assert accuracy(many.variables, split.forget) < 0.1
  chex.assert_trees_all_equal_shapes(many.variables, variables)


def test_conformance_time_is_without_evaluation(trained):
  options = {"num_epochs": 3, "batch_size": 32}
  run(neggrad.neggrad, trained, **options)  # Compiles.
  output = run(
    neggrad.neggrad,
    trained,
    callback=lambda state, record: time.sleep(0.5),
    **options,
  )
  assert sum(record["seconds"] for record in output.history) < 0.5
  output = run(ssd.ssd, trained, callback=lambda *_: time.sleep(2.0))
  assert output.history[0]["seconds"] < 2.0


@pytest.mark.parametrize("fn", [neggrad.neggrad, scrub.scrub])
def test_divergence_names_the_step(trained, fn):
  with pytest.raises(
    FloatingPointError, match=r"not finite (at|after) step \d"
  ):
    run(fn, trained, optimizer=optax.sgd(1e38), batch_size=16, num_epochs=3)


def test_no_phase_is_compiled_twice(trained):
  before = steps.num_programs()
  for key in jax.random.split(KEY):
    # Neither set is a multiple of the batch.
    run(scrub.scrub, trained, key, batch_size=19, num_epochs=4)
  assert steps.num_programs() == before + 2
  for penalty in (0.1, 0.2):
    run(l1_sparse.l1_sparse, trained, penalty=penalty, batch_size=19)
  assert steps.num_programs() == before + 3
  for _ in range(2):
    run(boundary_expanding.boundary_expanding, trained, batch_size=19)
  assert steps.num_programs() == before + 4


# Long passes are cut into calls of one program, with steps of padding.
def test_long_passes_equal_short_calls(trained, monkeypatch):
  options = {"num_epochs": 1, "batch_size": 4, "optimizer": training.sgd(0.1)}
  whole = run(neggrad.neggrad_plus, trained, **options)
  monkeypatch.setattr(batches, "MAX_STEPS_PER_CALL", 8)
  cut = run(neggrad.neggrad_plus, trained, **options)
  chex.assert_trees_all_close(whole.variables, cut.variables, atol=1e-6)
  assert len(cut.history[0]["step_losses"]) == len(
    whole.history[0]["step_losses"]
  )
  assert cut.history[0]["retain_loss"] == pytest.approx(
    whole.history[0]["retain_loss"], rel=1e-5
  )


@pytest.mark.parametrize("name", ["neggrad", "ssd"])
def test_devices_change_nothing(trained, name):
  fn = baselines.find(name).fn
  options = {"batch_size": 12}
  single = run(fn, trained, **options)
  several = run(fn, trained, mesh=parallel.create_mesh(8), **options)
  chex.assert_trees_all_close(
    several.variables, single.variables, atol=1e-4, rtol=1e-4
  )


@pytest.mark.parametrize("name", ["scrub", "salun", "ssd"])
def test_images_on_disk_change_nothing(trained, name):
  variables, split = trained

  def streamed(dataset):
    images = streaming.Images(
      [streaming.InMemory(dataset.images)],
      np.arange(len(dataset)),
      dataset.images.shape[1:],
      0,
    )
    return types.Dataset(
      images=images, labels=dataset.labels, class_names=dataset.class_names
    )

  fn = baselines.find(name).fn
  on_disk = types.Split(streamed(split.forget), streamed(split.retain))
  outputs = [
    run(fn, (variables, each), batch_size=19).variables
    for each in (split, on_disk)
  ]
  chex.assert_trees_all_close(*outputs, atol=1e-6)


def test_plans_take_each_image_as_often_as_any_other():
  plan = batches.beside_retain(KEY, 10, 37, 8)
  assert plan.rows.shape == (5, 16)
  retain = plan.rows[~plan.is_forget & (plan.weights > 0)]
  np.testing.assert_array_equal(np.sort(retain), np.arange(10, 47))
  counts = np.bincount(plan.rows[plan.is_forget], minlength=10)
  assert counts.max() - counts.min() <= 1
  for is_part in (plan.is_forget, ~plan.is_forget):
    np.testing.assert_allclose((plan.weights * is_part).sum(1), 1, rtol=1e-6)
  both = batches.mixed(KEY, 10, 37, 8)
  real = both.rows[both.weights > 0]
  np.testing.assert_array_equal(np.sort(real), np.arange(47))
  np.testing.assert_array_equal(both.is_forget, both.rows < 10)
  small = batches.forget_only(KEY, 3, 8)
  assert small.rows.shape == (1, 3)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("finetune", {"num_epochs": 0}, "num_epochs .* got 0"),
    ("finetune", {"batch_size": 0}, "batch_size .* got 0"),
    ("finetune", {"batch_stats": "of"}, "batch_stats must be one of"),
    ("neggrad", {"retain_share": 1.5}, "retain_share .* got 1.5"),
    ("random_labels", {"retain_weight": 0.0}, "retain_weight .* got 0.0"),
    ("l1_sparse", {"penalty": -1.0}, "penalty .* got -1.0"),
    ("l1_sparse", {"num_plain_epochs": 10}, "num_plain_epochs .* got 10"),
    ("scrub", {"temperature": 0.0}, "temperature .* got 0.0"),
    ("scrub", {"forget_batch_size": 0}, "forget_batch_size .* got 0"),
    ("bad_teacher", {"retain_fraction": 0.0}, "retain_fraction .* got 0.0"),
    ("salun", {"salient_fraction": 0.0}, "salient_fraction .* got 0.0"),
    ("ssd", {"reference": "al"}, "reference .* did you mean 'all'"),
    ("fisher", {"power": 0.0}, "power .* got 0.0"),
    ("unsir", {"num_noise_steps": 0}, "num_noise_steps .* got 0"),
    ("boundary_shrink", {"step_size": 0.0}, "step_size .* got 0.0"),
    ("cf_k", {}, "layers must be given .* got '(bias|kernel)'"),
    ("eu_k", {"layers": ("head",)}, "layers must be prefixes .* 'head'"),
  ],
)
def test_bad_options(trained, name, options, message):
  with pytest.raises(ValueError, match=message):
    run(baselines.find(name).fn, trained, **options)


def test_bad_splits(trained):
  variables, split = trained
  none = split.forget.take([])
  for name in ("finetune", "ssd", "gradient_ascent", "boundary_expanding"):
    with pytest.raises(ValueError, match="the forget set must not be empty"):
      run(baselines.find(name).fn, (variables, split._replace(forget=none)))
  with pytest.raises(ValueError, match="the retain set must not be empty"):
    run(finetune.finetune, (variables, split._replace(retain=none)))
  # Where no retained image is used, there need be none.
  run(gradient_ascent.gradient_ascent, (variables, split._replace(retain=none)))
