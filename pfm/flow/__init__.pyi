from .composition import Composition as Composition
from .composition import compose as compose
from .config import FlowConfig as FlowConfig
from .preference_flow import PreferenceFlow as PreferenceFlow
from .rounds import CyclingWarning as CyclingWarning
from .tuning import Setting as Setting
from .tuning import Tuning as Tuning
from .tuning import tune as tune
