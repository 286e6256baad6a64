"""Control: frozen policies refined on preferences between segments of their actions, and what that is held against."""
