"""A training that is interrupted goes on as if it had not been, from the newest whole checkpoint."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmaml
from jaxmaml import files
from jaxmaml.checkpoint import Manager, manager, states
from jaxmaml.types import MetaState

LEARNER = jaxmaml.maml(lambda params, batch: jnp.mean((params - batch) ** 2), optax.sgd(0.1), 1)
OPTIMIZER = optax.adam(0.1)
KEY = jax.random.key(0)


def _start():
    return jaxmaml.init_state(LEARNER, OPTIMIZER, jnp.array(0.0))


def _source(key):
    rows = 3 + jax.random.normal(key, (4, 2))
    return jaxmaml.Task(rows, rows)


def _batches(number):
    return [_source(jax.random.fold_in(KEY, step)) for step in range(number)]


def _fit(num_outer_steps, checkpoints=None, source=_source, num_steps_per_dispatch=4):
    return jaxmaml.fit(
        LEARNER, OPTIMIZER, _start(), source, num_outer_steps,
        key=KEY if callable(source) else None, checkpoints=checkpoints,
        num_steps_per_dispatch=num_steps_per_dispatch,
    )  # fmt: skip


def _equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _state(step):
    return MetaState(jnp.full(3, float(step)), (), jnp.array(step), ())


def _saved(directory, steps, scores=None, **options):
    """Saves the states of some steps, and returns the manager."""
    found = Manager(directory, every=1, **options)
    for step, score in zip(steps, scores or [None] * len(steps), strict=True):
        found.save(_state(step), score=score)
    found.wait()
    return found


def _damage(directory, step, name="_METADATA"):
    (path,) = directory.glob(f"{step:09d}")
    (path / name).write_bytes((path / name).read_bytes()[:-1])


class _Killed(Exception):
    pass


@pytest.mark.parametrize("what", ["function", "iterable"])
def test_a_fit_that_is_interrupted_ends_as_one_that_is_not(what, tmp_path):
    source = _source if what == "function" else _batches(18)
    whole = list(_fit(18, source=source))
    rows = np.concatenate([metrics["loss"] for _, metrics in whole])
    losses, meta_state = {}, None
    for num_items in (2, 1, 9):
        saved = Manager(tmp_path, every=3)
        for index, (meta_state, metrics) in enumerate(_fit(18, saved, source), start=1):
            first = int(meta_state.step) - len(metrics["loss"])
            losses |= dict(enumerate(metrics["loss"].tolist(), start=first))
            if index == num_items:
                break
        saved.wait()
    _equal(meta_state, whole[-1][0])
    assert [losses[step] for step in range(18)] == rows.tolist()


def test_checkpoints_are_written_between_dispatches(tmp_path):
    saved = Manager(tmp_path, every=3, keep_last=100)
    list(_fit(10, saved))
    assert saved.steps == [3, 6, 9, 10]


def test_dispatches_end_at_the_same_steps_after_a_resumption(tmp_path):
    saved = Manager(tmp_path, every=3)
    next(_fit(18, saved))
    saved.wait()
    found = Manager(tmp_path)
    assert found.steps == [3]
    assert [int(state.step) for state, _ in _fit(18, found)] == [4, 8, 12, 16, 18]


def test_a_training_can_be_made_longer(tmp_path):
    list(_fit(8, Manager(tmp_path)))
    longer = list(_fit(12, Manager(tmp_path)))
    assert [int(state.step) for state, _ in longer] == [12]
    _equal(longer[-1][0], list(_fit(12))[-1][0])


def test_a_training_that_is_complete_gives_its_last_state(tmp_path):
    expected = list(_fit(8, Manager(tmp_path)))[-1][0]
    ((found, metrics),) = _fit(8, Manager(tmp_path))
    _equal(found, expected)
    assert {name: rows.shape for name, rows in metrics.items()} == dict.fromkeys(
        ("loss", "query_loss", "grad_norm"), (0,)
    )


def test_a_checkpoint_before_the_first_step_is_refused(tmp_path):
    _saved(tmp_path, [2])
    start = _start()._replace(params=jnp.zeros(3), opt_state=(), step=jnp.array(5))
    with pytest.raises(ValueError, match=r"step 2 is before meta_state\.step=5"):
        jaxmaml.fit(LEARNER, OPTIMIZER, start, _source, 8, key=KEY, checkpoints=Manager(tmp_path))


def test_the_last_and_the_best_are_kept(tmp_path):
    scores = [3.0, 1.0, 2.0, 9.0, float("nan"), 8.0]
    found = _saved(tmp_path, range(1, 7), scores, keep_last=2, keep_best=2)
    assert found.steps == [2, 3, 5, 6]
    # Another process knows the scores, too.
    again = _saved(tmp_path, [7], [1.5], keep_last=2, keep_best=2)
    assert again.steps == [2, 6, 7]


def test_a_state_is_copied_before_it_is_donated_or_changed(tmp_path):
    change = jax.jit(lambda leaf: leaf + 1, donate_argnums=0)
    arrays = {"jax": jnp.zeros(1_000_000), "numpy": np.zeros(1_000_000), "key": jax.random.key(3)}
    saved = Manager(tmp_path)
    saved.save(arrays, step=1)
    change(arrays["jax"])
    arrays["numpy"][:] = 1
    saved.wait()
    like = {"jax": jnp.ones(1_000_000), "numpy": jnp.ones(1_000_000), "key": jax.random.key(0)}
    found = Manager(tmp_path).restore(like)
    assert found is not None
    assert not found.state["jax"].any()
    assert not found.state["numpy"].any()
    assert found.state["key"] == jax.random.key(3)


def test_a_record_comes_back(tmp_path):
    record = {"best": float("inf"), "curve": [[0, 0.1], [5, 1 / 3]], "text": "é"}
    saved = Manager(tmp_path)
    saved.save(_state(5), record=record)
    saved.wait()
    found = Manager(tmp_path).restore(_state(0))
    assert found is not None
    assert (found.step, found.record) == (5, record)


def test_a_second_checkpoint_of_a_step_is_the_newer_one(tmp_path):
    saved = Manager(tmp_path)
    for record in (1, 2, 3):
        saved.save(_state(5), record=record)
    saved.wait()
    found = saved.restore(_state(0))
    assert found is not None
    assert found.record == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_to_restore_is_none(tmp_path):
    assert Manager(tmp_path / "new").restore(_state(0)) is None
    assert not list(tmp_path.iterdir())


def test_another_configuration_is_refused(tmp_path):
    _saved(tmp_path, [1], config={"rate": 0.1})
    with pytest.raises(ValueError, match="another configuration"):
        Manager(tmp_path, config={"rate": 0.2}).restore(_state(0))
    with pytest.raises(ValueError, match="another model"):
        Manager(tmp_path).restore(_state(0)._replace(params=jnp.zeros(4)))


@pytest.mark.parametrize("options", [{"every": 0}, {"keep_last": 1}, {"keep_best": -1}])
def test_wrong_numbers_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        Manager(tmp_path, **options)


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(manager.time, "monotonic", lambda: now[0])
    exact = Manager(tmp_path, every=10)
    assert [exact.is_due(step) for step in (0, 9, 10, 13)] == [False, False, True, True]
    now[0] = 600.0
    assert exact.is_due(3)
    now[0] = 0.0

    # By default, as often as the share of the time allows.
    free = Manager(tmp_path)
    assert [free.is_due(step) for step in (499, 500)] == [False, True]
    free._last_step, free._end, free._seconds = 500, 100.0, 0.5
    now[0] = 149.0
    assert not free.is_due(1000)
    now[0] = 150.0
    assert free.is_due(1000)
    assert not free.is_due(900)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
    ),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "run"
    _saved(directory, [1, 2])
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_leads_to_the_checkpoint_before_it(damage, saved_twice, tmp_path):
    """Each file that the manifest lists, and the manifest."""
    newest = saved_twice / "000000002"
    listed = json.loads((newest / "manifest.json").read_text())
    for name in [*listed, "manifest.json"]:
        if damage == "truncated" and not (newest / name).stat().st_size:
            continue
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(saved_twice, copy)
        DAMAGES[damage](copy / "000000002" / name)
        said = []
        found = Manager(copy, say=said.append).restore(_state(0))
        assert found is not None
        assert found.step == 1
        _equal(found.state, _state(1))
        (line,) = said
        assert name in line
        assert line.endswith("the checkpoint before it is used")


def test_without_a_whole_checkpoint_training_does_not_start_anew(saved_twice, tmp_path):
    shutil.copytree(saved_twice, tmp_path / "a")
    for step in (1, 2):
        DAMAGES["truncated"](tmp_path / "a" / f"00000000{step}" / "_METADATA")
    with pytest.raises(files.ReadError, match=r"every checkpoint in .* is damaged"):
        Manager(tmp_path / "a", say=lambda line: None).restore(_state(0))


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(saved_twice, tmp_path):
    shutil.copytree(saved_twice, tmp_path / "a")
    DAMAGES["flipped"](tmp_path / "a" / "000000002" / "_METADATA")
    again = Manager(tmp_path / "a", say=lambda line: None)
    assert again.restore(_state(0)) is not None
    again.save(_state(2))
    again.wait()
    assert again.steps == [1, 2]
    found = Manager(tmp_path / "a").restore(_state(0))
    assert found is not None
    assert found.step == 2


def test_what_an_interrupted_save_left_is_no_checkpoint_and_is_removed(tmp_path):
    partial = tmp_path / "000000007.orbax-checkpoint-tmp"
    partial.mkdir()
    saved = Manager(tmp_path)
    assert saved.restore(_state(0)) is None
    saved.save(_state(1))
    saved.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["000000001"]


@pytest.fixture
def set_free(tmp_path, monkeypatch):
    """Sets the bytes that are free on the disk."""
    usage = shutil.disk_usage(tmp_path)
    return lambda free: monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=free)
    )


def _fit_while(saved, num_outer_steps, free_at, set_free):
    """Trains with a number of free bytes from some steps on, and returns the state of each step."""
    found = {}
    for meta_state, _ in _fit(num_outer_steps, saved, num_steps_per_dispatch=1):
        found[int(meta_state.step)] = meta_state
        if int(meta_state.step) in free_at:
            saved._join()
            set_free(free_at[int(meta_state.step)])
    return found


def test_training_goes_on_while_the_disk_is_full(tmp_path, set_free):
    said = []
    saved = Manager(tmp_path, every=2, say=said.append)
    found = _fit_while(saved, 12, {5: 0, 9: 10**9}, set_free)
    _equal(found[12], list(_fit(12))[-1][0])
    failed, again = said
    assert "the disk has 0.0 MB left: training goes on" in failed
    assert "can be written" in again
    assert saved.steps == [10, 12]


def test_the_last_good_state_stays_where_the_disk_is_full_at_the_end(tmp_path, set_free):
    said = []
    saved = Manager(tmp_path, every=2, say=said.append)
    with pytest.raises(files.WriteError, match=r"000000008 cannot be written: .* MB left"):
        _fit_while(saved, 8, {4: 0}, set_free)
    found = Manager(tmp_path).restore(_start())
    assert found is not None
    assert found.step == 4
    _equal(found.state, list(_fit(4))[-1][0])


def test_a_bug_while_saving_is_not_lost_with_the_thread(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise TypeError("bug")

    monkeypatch.setattr(states, "save", fail)
    saved = Manager(tmp_path)
    saved.save(_state(1))
    with pytest.raises(TypeError, match="bug"):
        saved.wait()
