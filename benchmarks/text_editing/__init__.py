"""Sentences moved towards what a judge prefers and rewritten by an editor, measured by another judge."""
