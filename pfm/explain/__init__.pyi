from .directions import contrastive_terms as contrastive_terms
from .explanation import Explanation as Explanation
from .explanation import explain as explain
from .results import Contrast as Contrast
from .results import Direction as Direction
from .results import Term as Term
from .results import TraitChange as TraitChange
