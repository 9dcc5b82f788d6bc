"""Tests of psg_jax.forget."""

import hashlib
import json
import os
import subprocess
import sys
import time

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from psg_jax import forget, types
from psg_jax.forget import sql

NAMES = ("cat", "dog", "owl")


def make_dataset(labels=(0, 1, 2, 0, 1, 2), ids="abcdef", **columns):
  ids = list(ids)
  return types.Dataset(
    images=np.arange(len(ids), dtype=np.uint8).reshape(-1, 1, 1, 1),
    labels=np.array(labels, np.int32),
    class_names=NAMES,
    ids=np.array(ids, str),
    metadata=pa.table({"id": ids, **columns}) if columns else None,
  )


@pytest.fixture
def dataset():
  return make_dataset(
    patient_id=["p", "p", None, "q", "", "r"],
    device=["A", "B", None, "A", "B", "C"],
    Age=[1, 2, None, 4, 5, 6],
  )


def forgotten(dataset, **criteria):
  split = forget.split(dataset, **criteria)
  retained = [i for i in dataset.ids if i not in set(split.forget.ids)]
  assert list(split.retain.ids) == retained
  return "".join(split.forget.ids)


def fails(call, *parts):
  with pytest.raises(ValueError, match=r".") as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  assert len(message) < 500
  for part in parts:
    assert part in message, message


# Known answers.


@pytest.mark.parametrize(
  ("criteria", "expected"),
  [
    ({"classes": 1}, "be"),
    ({"classes": "owl"}, "cf"),
    ({"classes": [0, "owl"]}, "acdf"),
    ({"classes": np.array([1])}, "be"),
    ({"classes": np.int64(1)}, "be"),
    ({"ids": "b"}, "b"),
    ({"ids": ["f", "b", "b"]}, "bf"),
    ({"ids": np.array(["f", "b"])}, "bf"),
    ({"where": "device = 'A'"}, "ad"),
    ({"where": "AGE > 4"}, "ef"),
    ({"where": "label = 'cat' AND row > 0"}, "d"),
    ({"where": "id IN ('a', 'c')"}, "ac"),
    ({"where": "metadata.device = 'C'"}, "f"),
    ({"where": "device IS NULL"}, "c"),
    ({"where": "device = 'A' -- the broken one"}, "ad"),
    ({"where": "device LIKE '%;%' OR row = 2"}, "c"),
    # Missing values are neither equal nor different.
    ({"where": "device <> 'A'"}, "bef"),
    (
      {
        "where": "patient_id IN"
        " (SELECT patient_id FROM metadata WHERE device = 'B')"
      },
      "abe",
    ),
    ({"classes": [0, 1], "where": "Age >= 2", "ids": ["a", "b", "d"]}, "bd"),
    # One image of patient p takes the other with it.
    ({"ids": "a", "group": "patient_id"}, "ab"),
    ({"where": "device = 'B'", "group": "patient_id"}, "abe"),
    # Images without a patient stand alone, whether null or blank.
    ({"ids": "c", "group": "patient_id"}, "c"),
    ({"ids": "e", "group": "patient_id"}, "e"),
  ],
)
def test_known_answers(dataset, criteria, expected):
  assert forgotten(dataset, **criteria) == expected


def test_parts_carry_everything(dataset):
  split = forget.split(dataset, classes="cat")
  np.testing.assert_array_equal(split.forget.images.ravel(), [0, 3])
  np.testing.assert_array_equal(split.retain.images.ravel(), [1, 2, 4, 5])
  np.testing.assert_array_equal(split.retain.labels, [1, 2, 1, 2])
  assert split.forget.class_names == NAMES
  assert split.retain.metadata["device"].to_pylist() == ["B", None, "B", "C"]


def test_without_metadata():
  dataset = make_dataset()
  assert forgotten(dataset, classes=0, ids=["a", "b"]) == "a"
  fails(lambda: forget.split(dataset, where="row = 1"), "where", "metadata")
  fails(
    lambda: forget.split(dataset, classes=0, group="patient_id"),
    "group",
    "'patient_id'",
    "metadata",
  )


@pytest.mark.parametrize(
  "values",
  [
    pa.array([7, 7, None, 8, None, 9]),
    pa.array([7.0, 7.0, np.nan, 8.0, np.nan, 9.0], from_pandas=False),
    pa.array(["p", "p", None, "q", " ", "r"]),
    pa.array(["p", "p", None, "q", "", "r"]).dictionary_encode(),
    pa.array(["p", "p", None, "q", "", "r"], pa.large_string()),
    pa.chunked_array([["p"], ["p", None, "q"], ["", "r"]]),
  ],
)
def test_groups_of_any_type(values):
  dataset = make_dataset(patient=values)
  for start, expected in {"a": "ab", "c": "c", "e": "e", "f": "f"}.items():
    assert forgotten(dataset, ids=start, group="patient") == expected


def test_own_columns_hide_those_of_the_metadata():
  dataset = make_dataset(label=list("xxxxxx"), row=[9] * 6, ID=list("fedcba"))
  assert forgotten(dataset, where="label = 'cat' AND row = 3") == "d"
  # Which of the two was meant cannot be told.
  fails(lambda: forget.split(dataset, where="ID = 'a'"), "where", "ID", "case")


# Fractions.


def make_grouped(num_images=400, num_groups=60):
  rng = np.random.default_rng(0)
  groups = rng.integers(0, num_groups, num_images)
  return make_dataset(
    rng.integers(0, 3, num_images),
    [f"i{i}" for i in range(num_images)],
    patient_id=[None if g == 0 else f"p{g}" for g in groups],
    device=rng.choice(["A", "B"], num_images).tolist(),
  )


def test_fraction_of_the_matching_images():
  dataset = make_grouped()
  matching = set(forget.split(dataset, classes=1).forget.ids)
  last = set()
  for fraction in (0.001, 0.1, 0.25, 0.9, 1.0):
    part = set(forget.split(dataset, classes=1, fraction=fraction).forget.ids)
    assert len(part) == max(1, int(fraction * len(matching) + 0.5))
    assert last <= part <= matching
    last = part


def test_fraction_of_the_matching_groups():
  dataset = make_grouped()
  codes = np.array(
    [
      p or i
      for p, i in zip(
        dataset.metadata["patient_id"].to_pylist(), dataset.ids, strict=True
      )
    ]
  )
  whole = forget.split(
    dataset, where="device = 'A' AND row < 90", group="patient_id"
  )
  part = forget.split(
    dataset, where="device = 'A' AND row < 90", group="patient_id", fraction=0.3
  )
  matching = set(codes[np.isin(dataset.ids, whole.forget.ids)])
  taken = set(codes[np.isin(dataset.ids, part.forget.ids)])
  left = set(codes[np.isin(dataset.ids, part.retain.ids)])
  assert taken <= matching
  assert not taken & left
  assert len(taken) == int(0.3 * len(matching) + 0.5)


def test_fraction_alone_is_a_random_part():
  dataset = make_grouped()
  parts = [
    forget.split(dataset, fraction=0.1, seed=seed).forget.ids
    for seed in (0, 0, 1)
  ]
  assert [len(part) for part in parts] == [40, 40, 40]
  np.testing.assert_array_equal(parts[0], parts[1])
  assert set(parts[0]) != set(parts[2])


def test_split_is_the_same_in_another_process(tmp_path):
  code = (
    "import numpy as np; from psg_jax import forget, types;"
    "d = types.Dataset(images=np.zeros((50, 1, 1, 1), np.uint8),"
    " labels=np.arange(50) % 2, class_names=('a', 'b'));"
    "r = forget.Request(classes=('b', 0), fraction=0.2, seed=5);"
    "print(forget.request_hash(r),"
    " forget.ids_hash(forget.split_request(d, r).forget.ids))"
  )
  outputs = {
    subprocess.run(
      [sys.executable, "-c", code],
      env={**os.environ, "PYTHONHASHSEED": seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ("1", "2")
  }
  assert len(outputs) == 1


# Properties.


@st.composite
def datasets(draw):
  num = draw(st.integers(2, 30))
  texts = st.one_of(st.none(), st.sampled_from(["", "p", "q", "r", "s"]))
  return make_dataset(
    draw(st.lists(st.integers(0, 2), min_size=num, max_size=num)),
    [f"i{i}" for i in range(num)],
    patient_id=pa.array(
      draw(st.lists(texts, min_size=num, max_size=num)), pa.string()
    ),
    age=pa.array(
      draw(
        st.lists(
          st.one_of(st.none(), st.integers(0, 9)), min_size=num, max_size=num
        )
      ),
      pa.int64(),
    ),
  )


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  dataset=datasets(),
  classes=st.one_of(st.none(), st.sets(st.integers(0, 2), min_size=1)),
  age=st.one_of(st.none(), st.integers(0, 9)),
  group=st.sampled_from([None, "patient_id"]),
  fraction=st.floats(0.01, 1.0),
)
def test_split_parts_the_images_and_keeps_groups_whole(
  dataset, classes, age, group, fraction
):
  criteria = {
    "classes": classes and sorted(classes),
    "where": None if age is None else f"age >= {age}",
    "group": group,
    "fraction": fraction,
  }
  try:
    split = forget.split(dataset, **criteria)
  except ValueError:
    # Nothing or everything matches.
    hypothesis.reject()
  forgotten, retained = list(split.forget.ids), list(split.retain.ids)
  assert forgotten
  assert retained
  assert sorted(forgotten + retained) == sorted(dataset.ids)
  patients = [
    {p for p in part.metadata["patient_id"].to_pylist() if p} for part in split
  ]
  if group:
    assert not patients[0] & patients[1]
  ages = dataset.metadata["age"].to_pylist()
  meets = {
    name
    for name, label, own in zip(dataset.ids, dataset.labels, ages, strict=True)
    if (not classes or label in classes)
    and (age is None or (own is not None and own >= age))
  }
  if not group:
    assert set(forgotten) <= meets
    if fraction == 1:
      assert set(forgotten) == meets
  request = forget.Request(**criteria)
  counts = forget.preview(dataset, split, by="age", request=request)
  assert sum(c.forget for c in counts.classes.values()) == len(forgotten)
  assert sum(c.retain for c in counts.columns["age"].values()) == len(retained)
  if group:
    assert counts.group.num_shared_groups == 0
    assert counts.group.num_added == len(set(forgotten) - meets)


# Conditions that are none.


@pytest.mark.parametrize(
  ("where", "parts"),
  [
    ("devise = 'A'", ["no column devise", "did you mean 'device'?"]),
    ("age2 > 3", ["no column age2", "did you mean 'Age'?"]),
    ("metadata.devic = 'A'", ["no column devic", "'device'"]),
    ('device = "A"', ["no column A", "single quotes"]),
    ("device = 'A", ["unterminated"]),
    ("device = = 1", []),
    ("SELECT 1", []),
    ("lst(device)", ["lst"]),
    ("regexp_matches(device, '[')", ["missing ]"]),
    ("Age = 'x'", ["'x'"]),
    ("device", ["VARCHAR", "not true or false"]),
    ("Age", ["BIGINT", "not true or false"]),
    ("count(*) > 1", ["aggregates"]),
    ("1; DROP TABLE metadata", ["syntax error"]),
    ("row = 1);", ["syntax error"]),
    ("row = 1); DROP TABLE metadata; --", ["syntax error"]),
    ("row = 1); SELECT (2", ["beyond a condition"]),
    ("row = 1) UNION SELECT (2", ["beyond a condition"]),
    ("row = 1) LIMIT (1", ["beyond a condition"]),
    ("row = 1) ORDER BY (row", ["beyond a condition"]),
    ("row = 1) GROUP BY (row", ["beyond a condition"]),
    ("row = 1) QUALIFY (true", ["beyond a condition"]),
    ("row = 1) USING SAMPLE (1", ["beyond a condition"]),
    ("row = $1", ["beyond a condition"]),
    ("1 IN (INSERT INTO metadata VALUES (1))", ["syntax error"]),
    ("1 IN (DELETE FROM metadata)", ["syntax error"]),
    ("row IN (SELECT row FROM '/etc/passwd')", ["/etc/passwd"]),
    ("row IN (SELECT 1 FROM read_csv('/etc/passwd'))", ["disabled"]),
    ("'' = (SELECT content FROM read_text('/etc/passwd'))", ["disabled"]),
    ("row IN (SELECT 1 FROM dataset)", ["dataset does not exist"]),
    ("random() < 0.5", ["random", "depends on more"]),
    ("current_date > '2020-01-01'", ["current_date", "depends on more"]),
    ("now() IS NULL", ["now", "depends on more"]),
    ("(" * 9999 + "true", ["parentheses"]),
    ("NOT " * 999 + "true", ["depth"]),
    ("NOT " * 9999 + "true", []),
    ("\0", ["where"]),
    ("-- nothing", []),
    ("row = 1 /* open", ["unterminated"]),
  ],
)
def test_bad_conditions(dataset, where, parts):
  quoted = " ".join(where.split())[:20]
  fails(
    lambda: forget.split(dataset, where=where),
    "where must be one SQL condition",
    *([quoted] if quoted.isprintable() and "'" not in quoted else []),
    *parts,
  )


@pytest.mark.parametrize(
  ("where", "part"),
  [
    ("row IN (SELECT row FROM metadata USING SAMPLE 3)", "sample"),
    ("row IN (SELECT row FROM metadata TABLESAMPLE 50%)", "sample"),
    (
      "row IN (SELECT a.row FROM metadata a JOIN (metadata TABLESAMPLE 5%) b"
      " ON a.row = b.row)",
      "sample",
    ),
    ("'4' IN (SELECT value FROM duckdb_settings())", "duckdb_settings"),
    ("1 IN (SELECT 1 FROM query('SELECT 1'))", "query"),
    ("1 IN (SELECT 1 FROM information_schema.tables)", "does not exist"),
    ("1 IN (SELECT 1 FROM duckdb_tables)", "duckdb_tables"),
    ("1 IN (SELECT 1 FROM (SUMMARIZE metadata))", "SUMMARIZE"),
    ("current_timestamp > TIMESTAMP '2020-01-01'", "current_timestamp"),
    ("get_current_timestamp() IS NOT NULL", "get_current_timestamp"),
    ("current_localtimestamp() IS NOT NULL", "current_localtimestamp"),
    ("ago(INTERVAL 1 DAY) IS NULL", "ago"),
    ("age(TIMESTAMP '2020-01-01') > INTERVAL 1 DAY", "today"),
    ("current_setting('threads') = '1'", "current_setting"),
    ("getvariable('a') IS NULL", "getvariable"),
    ("version() = '1'", "version"),
    ("gen_random_uuid() IS NULL", "gen_random_uuid"),
    ("Age < (SELECT reservoir_quantile(Age, .5) FROM metadata)", "reservoir"),
    ("row IN (SELECT row FROM metadata ORDER BY random() LIMIT 2)", "random"),
  ],
)
def test_conditions_are_functions_of_the_table(dataset, where, part):
  fails(
    lambda: forget.split(dataset, where=where),
    "where must be one SQL condition",
    part,
  )


@pytest.mark.parametrize(
  ("where", "expected"),
  [
    ("row IN (SELECT row FROM metadata LIMIT 2)", "ab"),
    ("row IN (SELECT row FROM metadata ORDER BY Age DESC LIMIT 1)", "f"),
    (
      "row IN (SELECT r FROM (SELECT row AS r, row_number() OVER () AS k"
      " FROM metadata) WHERE k < 3)",
      "ab",
    ),
    ("row IN (WITH old AS (FROM metadata WHERE Age > 4) SELECT row FROM old)",
     "ef"),
    ("row IN (SELECT * FROM range(2))", "ab"),
    ("row IN (VALUES (1), (3))", "bd"),
    ("age(DATE '2020-01-01', DATE '2020-01-01') = INTERVAL 0 DAY AND row < 1",
     "a"),
  ],
)  # fmt: skip
def test_what_has_no_order_of_its_own_has_the_tables(dataset, where, expected):
  for _ in range(2):
    assert forgotten(dataset, where=where) == expected


def test_times_with_a_zone_are_in_utc(monkeypatch):
  monkeypatch.setenv("TZ", "America/New_York")
  times = pa.array([0, 3600 * 23, 3600 * 25, 0, 0, 0], pa.timestamp("s", "UTC"))
  dataset = make_dataset(taken=times)
  assert forgotten(dataset, where="taken >= '1970-01-02'") == "c"


DAYS = ["14/02/2018", "27/12/2015", "01/03/2016", "", None, "02/01/2014"]


@pytest.mark.parametrize(
  ("days", "where"),
  [
    (DAYS, "day < '2016-01-01'"),
    (DAYS, "'2016-01-01' > day"),
    (DAYS, "day < '01/01/2016'"),
    (DAYS, "day <> '2016-01-01'"),
    (DAYS, "day IN ('2016-01-01', '2015-12-27')"),
    (DAYS, "day BETWEEN '2014-01-01' AND '2016-01-01'"),
    (DAYS, "row IN (SELECT row FROM metadata m WHERE m.day < '2016-01-01')"),
    (DAYS, "trim(day) < '2016-01-01'"),
    (["2/14/2018", "12/27/2015", "3/1/2016"] * 2, "day < '2016-01-01'"),
    (["14.02.18", "27.12.15", "01.03.16"] * 2, "day < '2016-01-01'"),
    (["14 Feb 2018", "27 Dec 2015", "1 Mar 2016"] * 2, "day < '2016-01-01'"),
    (["2018/02/14", "2015/12/27", "2016/03/01"] * 2, "day < '2016-01-01'"),
    (["20180214", "20151227", "20160301"] * 2, "day < '2016-01-01'"),
    (["2018-2-14", "2015-12-7", "2016-3-1"] * 2, "day < '2016-01-01'"),
    (["2018-02-14", "2015-12-27", "2016-03-01"] * 2, "day < '01/01/2016'"),
    (["2018-02-14", "2015-12-27", "unknown"] * 2, "day < '2016-01-01'"),
    (["3,5", "12,25", "20"] * 2, "day > '12'"),
    (["3", "12", "20"] * 2, "day > '12'"),
  ],
)
def test_dates_and_numbers_are_not_compared_by_letters(days, where):
  dataset = make_dataset(day=pa.array(days, pa.string()))
  fails(
    lambda: forget.split(dataset, where=where),
    "the column day is text",
    "by its letters",
  )


@pytest.mark.parametrize(
  ("days", "where", "expected"),
  [
    (DAYS, "day = '14/02/2018'", "a"),
    (DAYS, "day LIKE '%2015'", "b"),
    (
      DAYS,
      "TRY_STRPTIME(day, '%d/%m/%Y') < TIMESTAMP '2016-01-01'",
      "bf",
    ),
    (["2018-02-14", "2015-12-27", ""] * 2, "day > '2016-01-01'", "ad"),
    (["2018-02-14", "2015-12-27", ""] * 2, "day > '2016'", "ad"),
    (["2018/02/14", "2015/12/27", ""] * 2, "day > '2016/01/01'", "ad"),
    (["0012", "0013", "0120"] * 2, "day > '0012'", "bcef"),
    (["1", "2", "10"] * 2, "day IN ('1', '10')", "acdf"),
    (["2016-01-01", "unknown", None] * 2, "day = '2016-01-01'", "ad"),
    (["n1", "n2", "n3"] * 2, "day > 'n2'", "cf"),
  ],
)
def test_texts_are_compared_as_before(days, where, expected):
  dataset = make_dataset(day=pa.array(days, pa.string()))
  assert forgotten(dataset, where=where) == expected


def test_conditions_see_no_files(dataset, tmp_path):
  (tmp_path / "a.csv").write_text("row\n1\n")
  for source in (f"'{tmp_path}/a.csv'", f"read_csv('{tmp_path}/a.csv')"):
    where = f"row IN (SELECT row FROM {source})"
    fails(lambda where=where: forget.split(dataset, where=where), "where")


def test_conditions_have_a_time_limit(dataset, monkeypatch):
  endless = (
    "(WITH RECURSIVE a AS (SELECT 1 UNION ALL SELECT 1 FROM a)"
    " SELECT count(*) FROM a) = 3"
  )
  start = time.perf_counter()
  with monkeypatch.context() as short:
    short.setattr(sql, "TIME_LIMIT", 0.3)
    fails(lambda: forget.split(dataset, where=endless), "where", "within 0.3 s")
  assert time.perf_counter() - start < 10
  # The next one is not disturbed.
  assert forgotten(dataset, where="device = 'A'") == "ad"


def test_conditions_that_heed_no_interrupt_have_one(dataset, monkeypatch):
  monkeypatch.setattr(sql, "TIME_LIMIT", 0.2)
  monkeypatch.setattr(sql, "GRACE", 0.1)
  # One call of a function is not interrupted.
  where = "levenshtein(repeat(id, 12000), repeat('z', 12000)) = 1"
  start = time.perf_counter()
  fails(lambda: forget.split(dataset, where=where), "where", "within 0.2 s")
  assert time.perf_counter() - start < 10


def test_a_condition_is_decided_once(dataset, monkeypatch):
  calls = []
  run = sql.run

  def note(*args):
    # One that another test gave up may begin late on a busy machine.
    if args[-1].startswith("device"):
      calls.append(args[-1])
    return run(*args)

  monkeypatch.setattr(sql, "run", note)
  request = forget.Request(where="device = 'A'")
  parts = forget.split_request(dataset, request)
  forget.preview(dataset, parts, request=request)
  assert forget.matching(dataset, request).sum() == 2
  wrong = "device = 'A' AND 'x'::INT = 1"
  for _ in range(2):
    fails(lambda: forget.split(dataset, where=wrong), "where", "'x'")
  assert calls == ["device = 'A'", wrong]
  # Another set is asked anew.
  forget.split(dataset.take(np.arange(5)), where="device = 'A'")
  assert len(calls) == 3


def test_an_interrupt_that_comes_too_late(dataset, monkeypatch):
  monkeypatch.setattr(sql, "TIME_LIMIT", 0.2)

  def run(connection, *args):
    # Ends between the two looks at whether it goes on.
    time.sleep(0.3)
    connection.close()
    time.sleep(0.2)

  monkeypatch.setattr(sql, "run", run)
  fails(lambda: forget.split(dataset, where="Age = 1"), "within 0.2 s")


def test_columns_that_look_the_same_are_the_same():
  dataset = make_dataset(**{"ge\u0301ne": list("xxyyzz")})
  for name in ("g\u00e9ne", "ge\u0301ne", "G\u00e9NE"):
    assert forgotten(dataset, where=f"{name} = 'y'") == "cd"
    assert forgotten(dataset, where=f"\"{name}\" = 'y'") == "cd"
  assert forgotten(dataset, ids="a", group="g\u00e9ne") == "ab"
  request = forget.Request(where="g\u00e9ne = 'y'", group="g\u00e9ne")
  parts = forget.split_request(dataset, request)
  found = forget.preview(dataset, parts, by="g\u00e9ne", request=request)
  assert found.group.num_forget_groups == 1
  two = make_dataset(**{"e\u0301": list("xxyyzz"), "\u00e9": list("xxyyzz")})
  fails(lambda: forget.split(two, where="\u00e9 = 'x'"), "where", "accents")


@pytest.mark.parametrize(
  ("dates", "form"),
  [
    (["14/02/18", "27/12/15"], "%d/%m/%y"),
    (["2.14.18", "12.27.15"], "%m.%d.%y"),
    (["14-02-2018 09:30", "27-12-2015 10:00"], "%d-%m-%Y %H:%M"),
    (["14 Feb 2018", "27 Dec 2015"], "%d %b %Y"),
  ],
)
def test_hint_says_how_dates_are_written(dates, form):
  dataset = make_dataset(seen=[*dates] * 3)
  fails(
    lambda: forget.split(dataset, where="seen < '2016-01-01'"),
    f"strptime(seen, '{form}') < TIMESTAMP",
  )
  where = f"strptime(seen, '{form}') < TIMESTAMP '2016-01-31'"
  assert forgotten(dataset, where=where) == "bdf"


# Bad input.


@pytest.mark.parametrize(
  ("criteria", "parts"),
  [
    ({}, ["classes, where, ids", "none"]),
    ({"group": "patient_id"}, ["classes, where, ids", "none"]),
    ({"classes": 3}, ["classes", "[0, 3)", "got 3"]),
    ({"classes": -1}, ["classes", "[0, 3)", "got -1"]),
    ({"classes": "Cats"}, ["classes", "'Cats'", "did you mean 'cat'?"]),
    ({"classes": "zebra"}, ["classes", "'zebra'", "cat, dog, owl"]),
    ({"classes": []}, ["classes", "[]"]),
    ({"classes": True}, ["classes", "True"]),
    ({"classes": 1.0}, ["classes", "1.0"]),
    ({"classes": [0, 1, 2]}, ["classes 0, 1, 2", "all 6", "retained"]),
    ({"ids": ["a", "x", "y"]}, ["ids", "2 that are not", "x, y"]),
    ({"ids": []}, ["ids", "[]"]),
    ({"ids": [1.5]}, ["ids", "1.5"]),
    ({"ids": list("abcdef")}, ["ids", "all 6", "retained"]),
    ({"where": ""}, ["where", "''"]),
    ({"where": "  "}, ["where", "'  '"]),
    ({"where": 3}, ["where", "3"]),
    ({"where": "Age > 99"}, ["where 'Age > 99'", "no image"]),
    ({"where": "Age > NULL"}, ["where", "no image"]),
    ({"where": "row >= 0"}, ["where", "all 6", "'row >= 0'"]),
    ({"where": "row >= 0", "classes": 1}, ["where", "all 6"]),
    (
      {"where": "device = 'C'", "classes": "cat", "ids": "a"},
      ["classes cat and where", "ids a", "no image"],
    ),
    ({"classes": 0, "fraction": 0}, ["fraction", "(0, 1]", "got 0"]),
    ({"classes": 0, "fraction": 1.1}, ["fraction", "1.1"]),
    ({"classes": 0, "fraction": -0.5}, ["fraction", "-0.5"]),
    ({"classes": 0, "fraction": float("nan")}, ["fraction", "nan"]),
    ({"classes": 0, "fraction": "0.5"}, ["fraction", "'0.5'"]),
    ({"classes": 0, "fraction": True}, ["fraction", "True"]),
    ({"classes": 0, "seed": -1}, ["seed", "-1"]),
    ({"classes": 0, "seed": 0.5}, ["seed", "0.5"]),
    (
      {"classes": 0, "group": "patient"},
      ["group", "'patient'", "did you mean 'patient_id'?"],
    ),
    ({"classes": 0, "group": ""}, ["group", "''"]),
  ],
)
def test_bad_input(dataset, criteria, parts):
  fails(lambda: forget.split(dataset, **criteria), *parts)


def numbered(names):
  num = len(names)
  return types.Dataset(
    np.zeros((2 * num, 1, 1, 1), np.uint8), np.arange(2 * num) % num, names
  )


def test_classes_with_numbers_for_names():
  def classes(names, value):
    split = forget.split(numbered(names), classes=value)
    return {names[label] for label in split.forget.labels}

  assert classes(("0", "1", "2"), 1) == {"1"}
  assert classes(("1", "2", "3"), "1") == {"1"}
  # Above the numbers of the classes, it can but be a name.
  assert classes(("1", "2", "3"), 3) == {"3"}
  assert classes(("1", "2", "3"), 0) == {"1"}
  assert classes(("07", "12"), 12) == {"12"}
  for names in (("1", "2", "3"), ("01", "02", "03"), ("1.0", "2.0", "3.0")):
    fails(
      lambda names=names: forget.split(numbered(names), classes=1),
      "classes",
      f"the name of {names[0]!r}",
      f"the number of {names[1]!r}",
      f"label = '{names[0]}'",
    )


def test_groups_that_take_everything():
  dataset = make_dataset(patient_id=["p"] * 6)
  fails(
    lambda: forget.split(dataset, classes=0, group="patient_id"),
    "classes 0",
    "group 'patient_id'",
    "all 6",
  )


def test_groups_must_be_single_values():
  dataset = make_dataset(eyes=[["l", "r"]] * 6)
  fails(
    lambda: forget.split(dataset, classes=0, group="eyes"), "group", "'eyes'"
  )


def test_ids_must_be_unique():
  dataset = make_dataset(ids="abcdea")
  fails(lambda: forget.split(dataset, classes=0), "dataset", "unique ids", "a")


# Requests.


def test_equal_requests_have_one_form():
  one = forget.Request(classes=["owl", 2, 0, 2], ids=["b", "a", "b"])
  other = forget.Request(classes=(0, 2, "owl"), ids=np.array(["a", "b"]))
  assert one == other
  assert one.classes == (0, 2, "owl")
  assert one.ids == ("a", "b")
  assert forget.request_hash(one) == forget.request_hash(other)
  assert forget.Request(classes=2) == forget.Request(classes=[2])
  different = {
    forget.request_hash(forget.Request(**fields))
    for fields in (
      {"classes": 1},
      {"classes": "1"},
      {"ids": "1"},
      {"classes": 1, "seed": 1},
      {"classes": 1, "fraction": 0.5},
      {"classes": 1, "group": "x"},
      {"classes": 1, "where": "x"},
    )
  }
  assert len(different) == 7


def test_hashes_are_those_of_canonical_json():
  text = (
    '{"classes":[1,"\\u00fc"],"fraction":0.5,"group":null,"ids":null,'
    '"seed":3,"where":null}'
  )
  expected = hashlib.sha256(text.encode()).hexdigest()
  request = forget.Request(classes=["ü", 1], fraction=0.5, seed=3)
  assert forget.request_hash(request) == expected
  expected = hashlib.sha256(b'["a","b,c","d"]').hexdigest()
  assert forget.ids_hash(["d", "a", "b,c"]) == expected
  assert forget.ids_hash(np.array(["b,c", "a", "d"])) == expected
  assert forget.ids_hash(["a", "b", "c", "d"]) != expected


def test_request_gives_the_split_of_its_arguments(dataset):
  fields = {"where": "device = 'B'", "group": "patient_id"}
  request = forget.Request(**fields)
  given = forget.split_request(dataset, request)
  np.testing.assert_array_equal(
    given.forget.ids, forget.split(dataset, **fields).forget.ids
  )


@hypothesis.settings(
  max_examples=20,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  classes=st.lists(st.one_of(st.integers(0), st.text()), min_size=1),
  ids=st.one_of(st.none(), st.lists(st.text(min_size=1), min_size=1)),
  fraction=st.floats(0, 1, exclude_min=True),
  seed=st.integers(0, 2**63 - 1),
)
def test_request_file(tmp_path, classes, ids, fraction, seed):
  try:
    request = forget.Request(
      classes=classes, ids=ids, fraction=fraction, seed=seed, where="a = 'ü'"
    )
    request.to_json(tmp_path / "request.json")
  except UnicodeEncodeError:
    hypothesis.reject()
  again = forget.Request.from_json(tmp_path / "request.json")
  assert again == request
  assert forget.request_hash(again) == forget.request_hash(request)
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  ("content", "parts"),
  [
    ("", ["JSON"]),
    ("[1]", ["JSON object"]),
    ('{"clases": [1]}', ["'clases'", "did you mean 'classes'?"]),
    ('{"classes": [1.5]}', ["classes", "1.5"]),
    ('{"classes": 1, "seed": "3"}', ["seed", "3"]),
    ('{"classes": 1, "fraction": NaN}', ["fraction", "nan"]),
    ("{}", ["none"]),
    ('{"classes": [1], "classes": [2]}', ["'classes' stands in it twice"]),
    ("[" * 100_000, ["JSON"]),
  ],
)
def test_bad_request_files(tmp_path, content, parts):
  path = tmp_path / "request.json"
  path.write_text(content)
  fails(lambda: forget.Request.from_json(path), "request", *parts)


def test_bad_request_paths(tmp_path):
  fails(lambda: forget.Request.from_json(tmp_path / "no"), "request", "No such")
  request = forget.Request(classes=1)
  fails(lambda: request.to_json(tmp_path / "no" / "a.json"), "path", "folder")


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "request.json"
  forget.Request(classes=1).to_json(path)

  def fail(*_):
    raise OSError("the disk is full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="full"):
    forget.Request(classes=2).to_json(path)
  assert list(tmp_path.iterdir()) == [path]
  assert forget.Request.from_json(path) == forget.Request(classes=1)


# Previews.


def test_preview(dataset):
  request = forget.Request(where="device = 'B'", group="patient_id")
  split = forget.split_request(dataset, request)
  counts = forget.preview(dataset, split, by=["device"], request=request)
  expected = {
    "num_forget": 3,
    "num_retain": 3,
    "classes": {
      "cat": {"forget": 1, "retain": 1},
      "dog": {"forget": 2, "retain": 0},
      "owl": {"forget": 0, "retain": 2},
    },
    "columns": {
      "device": {
        "A": {"forget": 1, "retain": 1},
        "B": {"forget": 2, "retain": 0},
        "C": {"forget": 0, "retain": 1},
        "(none)": {"forget": 0, "retain": 1},
      }
    },
    "group": {
      "column": "patient_id",
      "num_groups": 3,
      "num_forget_groups": 1,
      "num_shared_groups": 0,
      "num_without_group": 2,
      "num_added": 1,
    },
    "num_without_metadata": 1,
    "missing": {"device": 1},
    "types": {"device": "text"},
    "alike": {},
    "num_undecided": 1,
  }
  assert counts.as_dict() == expected
  assert json.loads(json.dumps(counts.as_dict())) == expected


def test_preview_as_text(dataset):
  request = forget.Request(where="device = 'B'", group="patient_id")
  split = forget.split_request(dataset, request)
  text = str(forget.preview(dataset, split, by="device", request=request))
  assert text.splitlines() == [
    "                        forget    retain",
    "images                       3         3",
    "class",
    "  dog                        2         0",
    "  cat                        1         1",
    "  owl                        0         2",
    "device",
    "  B                          2         0",
    "  A                          1         1",
    "  C                          0         1",
    "  (none)                     0         1",
    "groups of patient_id         1         2",
    "device is compared as text",
    "1 forgotten only for their group",
    "2 without patient_id, standing alone",
    "1 without any metadata",
    "1 without device",
    "1 for which the condition is undecided",
  ]


def test_preview_names_values_that_look_the_same():
  patients = ["P03", "p03", "P03 ", "P04", "", None]
  dataset = make_dataset(patient_id=pa.array(patients, pa.string()))
  request = forget.Request(where="patient_id = 'P03'", group="patient_id")
  split = forget.split_request(dataset, request)
  counts = forget.preview(dataset, split, request=request)
  assert set(counts.alike["patient_id"]) == {"P03", "p03", "P03 "}
  assert "'P03 ' of patient_id differ in case or blanks" in str(counts)


def test_accents_are_the_same_however_they_are_written():
  composed, decomposed = "caf\u00e9", "cafe\u0301"
  dataset = types.Dataset(
    np.zeros((2, 1, 1, 1), np.uint8),
    np.array([0, 1]),
    (decomposed, "other"),
    np.array([f"{decomposed}/1", "other/1"]),
    pa.table({"clinic": [decomposed, "x"]}),
  )
  for criteria in (
    {"classes": composed},
    {"ids": f"{composed}/1"},
    {"where": f"label = '{composed}'"},
    {"where": f"clinic = '{composed}'"},
    {"where": f"id = '{decomposed}/1'"},
  ):
    split = forget.split(dataset, **criteria)
    assert list(split.forget.ids) == [f"{decomposed}/1"]


def test_preview_shows_groups_on_both_sides(dataset):
  split = forget.split(dataset, ids="a")
  counts = forget.preview(dataset, split, group="patient_id")
  assert counts.group.num_shared_groups == 1
  assert counts.group.num_added is None
  assert "1 groups of patient_id on both sides" in str(counts)


def test_preview_without_metadata():
  dataset = make_dataset()
  counts = forget.preview(dataset, forget.split(dataset, classes=0))
  assert counts.num_without_metadata == 6
  assert counts.group is None
  assert counts.columns == {}


def test_long_previews_are_cut():
  ids = [f"i{i}" for i in range(50)]
  dataset = make_dataset([0, 1] * 25, ids, name=ids)
  split = forget.split(dataset, classes=0)
  counts = forget.preview(dataset, split, by="name")
  assert len(counts.columns["name"]) == 50
  assert "and 38 more" in str(counts)
  assert len(str(counts).splitlines()) < 30


def test_preview_bad_input(dataset):
  split = forget.split(dataset, classes=0)
  for part in (
    types.Split(split.forget, split.forget),
    types.Split(split.forget, dataset),
    types.Split(split.forget, split.retain.take([0])),
  ):
    fails(lambda part=part: forget.preview(dataset, part), "split", "6 images")
  fails(
    lambda: forget.preview(dataset, split, by="devise"),
    "by",
    "'devise'",
    "did you mean 'device'?",
  )
  fails(
    lambda: forget.preview(dataset, split, group="patient"),
    "group",
    "'patient'",
  )


# Speed.


@pytest.mark.slow
def test_a_million_rows():
  num = 1_000_000
  rng = np.random.default_rng(0)
  ids = np.char.add("image_", np.arange(num).astype(str))
  patients = np.char.add("p", rng.integers(0, num // 5, num).astype(str))
  dataset = types.Dataset(
    images=np.zeros((num, 1, 1, 1), np.uint8),
    labels=rng.integers(0, 3, num),
    class_names=NAMES,
    ids=ids,
    metadata=pa.table(
      {
        "id": ids,
        "patient_id": patients,
        "device": rng.choice(["A", "B", "C"], num),
        "age": rng.integers(20, 90, num),
      }
    ),
  )
  split = forget.split(
    dataset, where="device = 'B' AND age > 60", group="patient_id"
  )
  assert len(split.forget) + len(split.retain) == num
  matches = np.asarray(dataset.metadata.column("device").to_numpy() == "B") & (
    dataset.metadata.column("age").to_numpy() > 60
  )
  is_asked = np.isin(patients, np.unique(patients[matches]))
  np.testing.assert_array_equal(split.forget.ids, ids[is_asked])
