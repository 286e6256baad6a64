"""Methods of control, one family a module; what they share is :mod:`benchmarks.control.learning`."""
