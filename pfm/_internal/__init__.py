"""What several packages need and no user imports: files, archives, endpoints, pages, significance."""
