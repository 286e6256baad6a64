from .explanation import Contrast as Contrast
from .explanation import Direction as Direction
from .explanation import Explanation as Explanation
from .explanation import Term as Term
from .explanation import TraitChange as TraitChange
from .explanation import contrastive_terms as contrastive_terms
from .explanation import explain as explain
