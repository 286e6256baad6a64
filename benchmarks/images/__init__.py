"""Images of digits, moved by flows that are fitted on one classifier's preferences and measured by others."""
