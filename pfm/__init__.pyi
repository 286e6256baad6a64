from . import (
    acquisition as acquisition,
)
from . import (
    decoders as decoders,
)
from . import (
    distances as distances,
)
from . import (
    encoders as encoders,
)
from . import (
    evaluation as evaluation,
)
from . import (
    explain as explain,
)
from . import (
    generators as generators,
)
from . import (
    integrations as integrations,
)
from . import (
    judges as judges,
)
from . import (
    pbrl as pbrl,
)
from . import (
    preferences as preferences,
)
from . import (
    references as references,
)
from . import (
    tastes as tastes,
)
from .data.encoded import EncodedPairs as EncodedPairs
from .data.errors import PreferenceDataError as PreferenceDataError
from .data.folders import encode_files as encode_files
from .data.pairs import PreferencePairs as PreferencePairs
from .errors import (
    EncodingError as EncodingError,
)
from .errors import (
    GenerationError as GenerationError,
)
from .errors import (
    NonFiniteWarning as NonFiniteWarning,
)
from .errors import (
    NotRegisteredError as NotRegisteredError,
)
from .errors import (
    PfmError as PfmError,
)
from .errors import (
    ProcessLostError as ProcessLostError,
)
from .evaluation.evaluation import evaluate as evaluate
from .evaluation.report import Report as Report
from .evaluation.results import Scored as Scored
from .flow.composition import Composition as Composition
from .flow.composition import compose as compose
from .flow.config import FlowConfig as FlowConfig
from .flow.couplings import register_coupling as register_coupling
from .flow.distributed import processes as processes
from .flow.integration import register_solver as register_solver
from .flow.preference_flow import PreferenceFlow as PreferenceFlow
from .flow.registered_field import register_field as register_field
from .flow.tuning import Tuning as Tuning
from .flow.tuning import tune as tune
from .refiner.refinement import Refinement as Refinement
from .refiner.refiner import Refiner as Refiner
from .refiner.refiner import wrap as wrap

__all__: list[str]
