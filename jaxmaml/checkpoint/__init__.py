"""Checkpoints: saving and restoring a state, and a manager that does so along a training.

`save` writes one state, `restore` reads it, `verify` checks its files, and `read_record` returns what
was kept beside it. `jaxmaml.fit(..., checkpoints=Manager(directory))` saves a training in the
background and goes on with it after an interruption.
"""

from jaxmaml.checkpoint.manager import Checkpoint as Checkpoint
from jaxmaml.checkpoint.manager import Manager as Manager
from jaxmaml.checkpoint.states import read_record as read_record
from jaxmaml.checkpoint.states import restore as restore
from jaxmaml.checkpoint.states import save as save
from jaxmaml.checkpoint.states import verify as verify
