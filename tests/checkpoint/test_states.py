"""A state comes back as it was saved, or not at all."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmaml import checkpoint, files, parallel
from jaxmaml.checkpoint import states
from jaxmaml.types import MetaState


def _state(width=3):
    params = {"conv": {"0": {"kernel": jnp.arange(2.0 * width).reshape(2, width)}}}
    optimizer = optax.adam(1e-3)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return MetaState(params, opt_state, jnp.asarray(7), {"mean": jnp.ones(2)})


def test_round_trip(tmp_path):
    state = _state()
    checkpoint.save(tmp_path / "exact@0.4", state)
    restored = checkpoint.restore(tmp_path / "exact@0.4", jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path / "exact", _state())
    with pytest.raises(ValueError, match=r"another model: .*conv\.0\.kernel"):
        checkpoint.restore(tmp_path / "exact", _state(width=4))


def test_another_dtype_is_refused(tmp_path):
    state = _state()
    checkpoint.save(tmp_path / "exact", state)
    like = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    with pytest.raises(ValueError, match=r"conv\.0\.kernel is float32\[2,3\] .* bfloat16\[2,3\]"):
        checkpoint.restore(tmp_path / "exact", state._replace(params=like))


def test_another_structure_is_refused(tmp_path):
    state = _state()
    checkpoint.save(tmp_path / "exact", state)
    with pytest.raises(ValueError, match=r"state\.mean is float32\[2\] .* and absent in the model"):
        checkpoint.restore(tmp_path / "exact", state._replace(state=()))


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.int4), jnp.ones(2, jnp.complex64),
        jnp.zeros((0, 3)), jnp.array(True), jax.random.key(3), jax.random.split(jax.random.key(3)),
    ],
    ids=lambda leaf: f"{leaf.dtype}{leaf.shape}",
)  # fmt: skip
def test_every_kind_of_leaf_comes_back(leaf, tmp_path):
    state = MetaState({"leaf": leaf}, (), jnp.array(0))
    checkpoint.save(tmp_path / "a", state)
    found = checkpoint.restore(tmp_path / "a", jax.eval_shape(lambda: state)).params["leaf"]
    assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    assert jnp.array_equal(found, leaf)


def test_a_leaf_is_restored_with_the_sharding_of_its_like(tmp_path):
    state, mesh = _state(), parallel.make_mesh(2)
    checkpoint.save(tmp_path / "two", parallel.place(state, mesh))
    for like in (state, parallel.place(state, mesh)):
        found = checkpoint.restore(tmp_path / "two", like)
        assert jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, found, like))
        assert found.params["conv"]["0"]["kernel"].sharding == like.step.sharding


ON_ONE_DEVICE = """
import sys, jax, jax.numpy as jnp
from jaxmaml import checkpoint, MetaState
jax.config.update("jax_num_cpu_devices", 1)
found = checkpoint.restore(sys.argv[1], MetaState(jnp.zeros(3), (), jnp.array(0)))
assert found.params.tolist() == [1, 2, 3]
"""


@pytest.mark.slow
def test_a_state_of_two_devices_is_restored_where_there_is_one(tmp_path):
    state = MetaState(jnp.array([1.0, 2, 3]), (), jnp.array(0))
    checkpoint.save(tmp_path / "a", parallel.place(state, parallel.make_mesh(2)))
    subprocess.run([sys.executable, "-c", ON_ONE_DEVICE, str(tmp_path / "a")], check=True)


def test_another_configuration_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a", _state(), config={"rate": 0.1, "sizes": (1, 2)})
    checkpoint.restore(tmp_path / "a", _state(), config={"sizes": [1, 2], "rate": 0.1})
    checkpoint.restore(tmp_path / "a", _state())
    with pytest.raises(ValueError, match="another configuration"):
        checkpoint.restore(tmp_path / "a", _state(), config={"rate": 0.2, "sizes": (1, 2)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a"
    checkpoint.save(path, _state())
    return path


def test_the_manifest_covers_every_file_that_is_read(saved):
    listed = set(json.loads((saved / "manifest.json").read_text()))
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert found - listed <= {"manifest.json", *states._TIMES}
    assert {"_METADATA", "_sharding", "manifest.ocdbt"} <= listed


def _emptied(path, content):
    path.write_bytes(b"")


def _flipped(path, content):
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def _removed(path, content):
    path.unlink()


def _a_directory(path, content):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_emptied, _flipped, _removed, _a_directory])
def test_damage_to_any_file_is_refused_by_its_name(damage, saved, tmp_path):
    names = ["manifest.json", *json.loads((saved / "manifest.json").read_text())]
    for number, name in enumerate(names):
        path = tmp_path / str(number)
        _copy(saved, path)
        damage(path / name, (path / name).read_bytes())
        with pytest.raises(ValueError, match=f"{path}/") as error:
            checkpoint.restore(path, _state())
        assert name in str(error.value) or name == "manifest.json"


def _copy(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())


def test_damage_to_files_that_are_not_read_changes_nothing(saved, tmp_path):
    _copy(saved, tmp_path / "a")
    for name in states._TIMES:
        (tmp_path / "a" / name).unlink(missing_ok=True)
    found = checkpoint.restore(tmp_path / "a", _state())
    jax.tree.map(np.testing.assert_array_equal, found, _state())


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("RESOURCE_EXHAUSTED")])
def test_a_failed_save_is_one_line_and_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(states._Handler, "finalize", fail)
    with pytest.raises(files.WriteError, match=r"checkpoint .*a\[1\] cannot be written: .*[Ss]"):
        checkpoint.save(tmp_path / "a[1]", _state())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_before_orbax_writes(tmp_path, monkeypatch):
    usage = states.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(states.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(files.WriteError, match=r"needs 0\.2 MB, and the disk has 0\.0 MB left"):
        checkpoint.save(tmp_path / "new" / "a", _state())
    assert not list(tmp_path.iterdir())


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere"):
        checkpoint.restore(tmp_path / "nowhere", _state())


def test_never_over_another(tmp_path):
    checkpoint.save(tmp_path / "exact", _state())
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save(tmp_path / "exact", _state())


@pytest.mark.parametrize("leaf", [np.array(2**40), np.uint64(2**63), np.array([1, 1e300])])
def test_numbers_that_jax_would_cut_are_refused(leaf, tmp_path):
    with pytest.raises(ValueError, match=r"at 'a/0' that are too large for \w+32"):
        checkpoint.save(tmp_path / "state", {"a": [leaf]})
    with pytest.raises(ValueError, match="too large"):
        checkpoint.Manager(tmp_path / "many").save({"a": [leaf]}, step=1)
    assert not (tmp_path / "state").exists()


def test_numbers_of_64_bits_that_jax_keeps_are_saved(tmp_path):
    checkpoint.save(tmp_path / "state", {"a": np.int64(7), "b": np.array([0.5, np.inf])})
    like = {"a": jnp.int32(0), "b": jnp.zeros(2)}
    found = checkpoint.restore(tmp_path / "state", like=like)
    assert (found["a"], found["b"].tolist()) == (7, [0.5, np.inf])
