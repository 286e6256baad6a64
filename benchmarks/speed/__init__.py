"""What ``task=speed`` measures: one module a part of the library."""
