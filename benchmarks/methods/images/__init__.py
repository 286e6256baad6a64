"""Methods that move images of ``task=mnist`` and ``task=digits``: one module a family, with ``make(config)``."""
