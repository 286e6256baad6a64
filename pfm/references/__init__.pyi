from .coupling import TaggedEnds as TaggedEnds
from .pairs import TaggedPairs as TaggedPairs
from .pooled_flow import PooledFlow as PooledFlow
from .shares import WinRates as WinRates
from .shares import learned_shares as learned_shares
from .shares import maximin_shares as maximin_shares
from .shares import winners_shares as winners_shares
