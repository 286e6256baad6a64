"""Preference-based control: frozen policies, refined by a flow over segments of their actions.

Names are imported when they are first used, so that ``import pfm`` does not wait for gymnasium or a simulator. Which
names there are, the stub beside this file says. What needs them is installed by
``pip install "preference-flow[pbrl]"``.
"""

from typing import Any

from pfm._internal import lazy as _lazy

_attribute, __dir__, __all__ = _lazy.attach(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _attribute(name)
    except ModuleNotFoundError as error:
        if error.name != "gymnasium":
            raise
        raise ImportError(f'pfm.pbrl.{name} needs gymnasium: pip install "preference-flow[pbrl]"') from error
