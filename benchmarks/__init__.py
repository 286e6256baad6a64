"""Measurements of preference flows: ``python -m benchmarks task=alpaca method=pfm seed=0``.

The way of a run: ``config`` holds the settings, ``tasks`` loads the data and ``methods`` makes what is measured;
``runner`` brings the two together and writes ``metrics.json`` and the arrays that figures need; ``report`` reads these.
Tasks are of kinds, and a method is made for one: it chooses among judged candidates (``selection``), or it moves draws
of a distribution of which everything is known exactly (``laws``). A new task is a file in ``tasks`` with a dataclass in
``config`` and an entry of ``conf/tasks.yaml``, a new method likewise.
"""
