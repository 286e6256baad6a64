from .adapted import AdaptedTaste as AdaptedTaste
from .flows import append_code as append_code
from .flows import taste_flows as taste_flows
from .flows import with_code as with_code
from .mixture import TasteMixture as TasteMixture
from .raters import check_names as check_names
from .raters import number_raters as number_raters
