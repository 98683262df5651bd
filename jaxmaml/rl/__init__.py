"""Meta-reinforcement-learning: environments, policies, rollouts and estimators, wholly in JAX."""

from jaxmaml.rl.baselines import advantages as advantages
from jaxmaml.rl.baselines import discounted_returns as discounted_returns
from jaxmaml.rl.baselines import linear_baseline as linear_baseline
from jaxmaml.rl.environments import Environment as Environment
from jaxmaml.rl.environments import Step as Step
from jaxmaml.rl.environments import TabularTask as TabularTask
from jaxmaml.rl.environments import bandit as bandit
from jaxmaml.rl.environments import navigation_2d as navigation_2d
from jaxmaml.rl.environments import point_robot as point_robot
from jaxmaml.rl.environments import tabular_mdp as tabular_mdp
from jaxmaml.rl.policies import Categorical as Categorical
from jaxmaml.rl.policies import CategoricalPolicy as CategoricalPolicy
from jaxmaml.rl.policies import GaussianPolicy as GaussianPolicy
from jaxmaml.rl.policies import Normal as Normal
from jaxmaml.rl.policies import policy as policy
from jaxmaml.rl.problems import Experience as Experience
from jaxmaml.rl.problems import Losses as Losses
from jaxmaml.rl.problems import Problem as Problem
from jaxmaml.rl.problems import likelihood_ratio as likelihood_ratio
from jaxmaml.rl.problems import losses as losses
from jaxmaml.rl.requests import Request as Request
from jaxmaml.rl.requests import RequestSampler as RequestSampler
from jaxmaml.rl.requests import sampler as sampler
from jaxmaml.rl.rollouts import Trajectories as Trajectories
from jaxmaml.rl.rollouts import rollout as rollout
