"""Internals that several packages share: files, archives, checks, endpoints, pages, significance."""
