"""Meta-reinforcement-learning: environments, policies, rollouts and estimators, wholly in JAX.

What a module is for:

- `environments`: those of the papers; `wrappers`: environments made of others; `adapters_gymnax`,
  `adapters_brax` and what they share, `adapters`: those of other packages; `drawing`: pictures of the
  half-cheetah.
- `policies`: networks and their distributions; `rollouts`: trajectories; `baselines`: advantages;
  `requests`: tasks, whose data the learner samples.
- `problems`: losses that sample, for any learner; `surrogates`: the inner loss; `corrections`: the
  derivative of what is sampled.
- `collecting`: samples that stay the same during an outer step, for the outer optimizers
  `trust_region` (TRPO) and `proximal` (ProMP).
- `recurrent`, `trials`, `remembering` and `recurrent_ppo`: RL², from the policy to its optimizer.
"""

from jaxmaml.rl.adapters_brax import from_brax as from_brax
from jaxmaml.rl.adapters_brax import half_cheetah as half_cheetah
from jaxmaml.rl.adapters_gymnax import from_gymnax as from_gymnax
from jaxmaml.rl.baselines import advantages as advantages
from jaxmaml.rl.baselines import discounted_returns as discounted_returns
from jaxmaml.rl.baselines import linear_baseline as linear_baseline
from jaxmaml.rl.collecting import collect as collect
from jaxmaml.rl.corrections import with_sampling_correction as with_sampling_correction
from jaxmaml.rl.drawing import cheetah_segments as cheetah_segments
from jaxmaml.rl.drawing import draw_cheetah as draw_cheetah
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
from jaxmaml.rl.proximal import Promp as Promp
from jaxmaml.rl.proximal import promp as promp
from jaxmaml.rl.recurrent import GruPolicy as GruPolicy
from jaxmaml.rl.recurrent import Memory as Memory
from jaxmaml.rl.recurrent import RecurrentPolicy as RecurrentPolicy
from jaxmaml.rl.recurrent import WithMemory as WithMemory
from jaxmaml.rl.recurrent import recurrent_policy as recurrent_policy
from jaxmaml.rl.recurrent_ppo import Ppo as Ppo
from jaxmaml.rl.recurrent_ppo import ppo as ppo
from jaxmaml.rl.remembering import rl_squared as rl_squared
from jaxmaml.rl.requests import Request as Request
from jaxmaml.rl.requests import RequestSampler as RequestSampler
from jaxmaml.rl.requests import sampler as sampler
from jaxmaml.rl.rollouts import Trajectories as Trajectories
from jaxmaml.rl.rollouts import rollout as rollout
from jaxmaml.rl.surrogates import surrogate as surrogate
from jaxmaml.rl.trials import RecurrentProblem as RecurrentProblem
from jaxmaml.rl.trials import TrialExperience as TrialExperience
from jaxmaml.rl.trials import Trials as Trials
from jaxmaml.rl.trials import trial_advantages as trial_advantages
from jaxmaml.rl.trust_region import Trpo as Trpo
from jaxmaml.rl.trust_region import TrpoState as TrpoState
from jaxmaml.rl.trust_region import trpo as trpo
from jaxmaml.rl.wrappers import observed_task as observed_task
