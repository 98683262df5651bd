"""One file an algorithm; each is a constructor that returns a `MetaLearner`."""

from jaxmaml.learners.anil import anil as anil
from jaxmaml.learners.boil import boil as boil
from jaxmaml.learners.cavia import cavia as cavia
from jaxmaml.learners.fine_tuning import Classes as Classes
from jaxmaml.learners.fine_tuning import fine_tuning as fine_tuning
from jaxmaml.learners.imaml import imaml as imaml
from jaxmaml.learners.inner_loop import multi_step_weights as multi_step_weights
from jaxmaml.learners.learned_optimizer import learned_optimizer as learned_optimizer
from jaxmaml.learners.maml import maml as maml
from jaxmaml.learners.maml_plus_plus import maml_plus_plus as maml_plus_plus
from jaxmaml.learners.meta_curvature import meta_curvature as meta_curvature
from jaxmaml.learners.meta_sgd import meta_sgd as meta_sgd
from jaxmaml.learners.proto_maml import proto_maml as proto_maml
from jaxmaml.learners.protonet import protonet as protonet
from jaxmaml.learners.r2d2 import r2d2 as r2d2
from jaxmaml.learners.reptile import reptile as reptile
from jaxmaml.learners.unicorn import unicorn as unicorn
