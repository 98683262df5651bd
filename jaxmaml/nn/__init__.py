"""Models, convolution, normalization, losses, and adapters for models of other libraries.

What a module is for:

- `models` and `resnet`: the networks, made of `layers`; `losses`: losses and accuracy.
- `norm`: the policies of normalization, by means of `normalizer`; `pooling`: max-pooling.
- `convolution`: that of the networks; `forms`: the convolutions of any model, replaced, by means of
  `general_conv` and `layouts`.
- `adapters`, `adapters_flax`, `adapters_equinox`, `adapters_haiku`: models of other libraries.
"""

from jaxmaml.nn.adapters import StatefulModel as StatefulModel
from jaxmaml.nn.adapters import first_ways as first_ways
from jaxmaml.nn.adapters import from_function as from_function
from jaxmaml.nn.adapters_equinox import from_equinox as from_equinox
from jaxmaml.nn.adapters_equinox import from_equinox_with_state as from_equinox_with_state
from jaxmaml.nn.adapters_flax import from_linen as from_linen
from jaxmaml.nn.adapters_flax import from_linen_with_state as from_linen_with_state
from jaxmaml.nn.adapters_flax import from_nnx as from_nnx
from jaxmaml.nn.adapters_flax import from_nnx_with_state as from_nnx_with_state
from jaxmaml.nn.adapters_haiku import from_haiku as from_haiku
from jaxmaml.nn.adapters_haiku import from_haiku_with_state as from_haiku_with_state
from jaxmaml.nn.convolution import conv as conv
from jaxmaml.nn.forms import Convolution as Convolution
from jaxmaml.nn.forms import convolutions_of as convolutions_of
from jaxmaml.nn.forms import fast_convolutions as fast_convolutions
from jaxmaml.nn.losses import accuracy as accuracy
from jaxmaml.nn.losses import binary_cross_entropy as binary_cross_entropy
from jaxmaml.nn.losses import cross_entropy as cross_entropy
from jaxmaml.nn.losses import mean_squared_error as mean_squared_error
from jaxmaml.nn.models import MLP as MLP
from jaxmaml.nn.models import Conv4 as Conv4
from jaxmaml.nn.norm import make_norm as make_norm
from jaxmaml.nn.pooling import max_pool as max_pool
from jaxmaml.nn.pooling import normalize_and_pool as normalize_and_pool
from jaxmaml.nn.resnet import ResNet12 as ResNet12
