from .calibration import calibrate as calibrate
from .refinement import Refinement as Refinement
from .refiner import Refiner as Refiner
from .refiner import wrap as wrap
from .stopping import Stopping as Stopping
