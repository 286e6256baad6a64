"""Which pairs to label next: configuration and report."""
