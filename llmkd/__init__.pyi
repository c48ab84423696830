from .api import fused_loss as fused_loss
from .api import make_divergence as make_divergence
from .api import train as train
from .batch import Batch as Batch
from .batch import Example as Example
from .batch import View as View
from .config.loader import load_recipe as load_recipe
from .config.recipe import Recipe as Recipe
from .errors import ArgumentError as ArgumentError
from .errors import NonFinite as NonFinite
from .errors import Stopped as Stopped
from .errors import UserError as UserError
from .head import Head as Head
from .losses import divergences as divergences
from .losses.objective import Objective as Objective
from .losses.target_weights import register_target_weights as register_target_weights
from .signals import Dense as Dense
from .signals import Divergence as Divergence
from .signals import FullDistribution as FullDistribution
from .signals import Signal as Signal
from .signals import Teacher as Teacher
from .tasks.builtin import register as register
from .teachers.cache.shards import TeacherCache as TeacherCache
from .teachers.cached import CachedTeacher as CachedTeacher

__version__: str
