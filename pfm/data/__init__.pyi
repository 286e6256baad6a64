from .encoded import EncodedPairs as EncodedPairs
from .errors import PreferenceDataError as PreferenceDataError
from .pairs import PreferencePairs as PreferencePairs
from .votes import fit_prior as fit_prior
from .votes import soft_labels as soft_labels
