"""The options that choose devices, and how a training is spread over them."""

import jax
import pytest

from jaxmaml import parallel
from jaxmaml.experiments import devices


@pytest.mark.parametrize(
    ("options", "shape", "axes"),
    [
        ({}, {"tasks": 4}, ()),
        ({"devices": "2"}, {"tasks": 2}, ()),
        ({"mesh": "tasks=2"}, {"tasks": 2}, ()),
        ({"mesh": "model=2, tasks=2"}, {"tasks": 2, "model": 2}, ("model",)),
        ({"fully_sharded": True}, {"tasks": 4}, ("tasks",)),
        (
            {"mesh": "tasks=2,model=2", "fully_sharded": True},
            {"tasks": 2, "model": 2},
            ("tasks", "model"),
        ),
    ],
)
def test_options_choose_a_mesh_and_what_is_split(options, shape, axes):
    found = devices.choose(32, **options)
    assert (dict(found.mesh.shape), found.axes) == (shape, axes)


def test_one_process_uses_no_more_devices_than_tasks():
    assert devices.choose(3).mesh.size == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "0"}, "devices must be all or a number, 1 or more; got '0'"),
        ({"devices": "some"}, "devices must be all or a number, 1 or more; got 'some'"),
        ({"devices": "9"}, "devices must be all or at most 4; got 9"),
        ({"mesh": "tasks=8"}, "a mesh of tasks=8 and model=1 needs 8 devices; there are 4"),
        (
            {"mesh": "data=2"},
            "mesh has the axes tasks and model, as in tasks=4,model=2; got 'data=2'",
        ),
        ({"mesh": "tasks"}, "mesh must give each axis one size"),
        ({"mesh": "tasks=0"}, "mesh must give each axis one size"),
        ({"mesh": "tasks=1,tasks=2"}, "mesh must give each axis one size"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        devices.choose(32, **options)


def test_a_state_is_placed_as_the_options_say():
    tree = {"kernel": jax.numpy.zeros((4, 6)), "bias": jax.numpy.zeros(3)}
    placed = devices.choose(32, mesh="tasks=2,model=2", fully_sharded=True).place(tree)
    specs = parallel.specs_of(placed, placed["bias"].sharding.mesh)
    assert {name: tuple(spec) for name, spec in specs.items()} == {
        "kernel": ("model", "tasks"), "bias": (),
    }  # fmt: skip
