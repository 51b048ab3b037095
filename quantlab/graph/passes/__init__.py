"""Passes that rewrite a captured graph, one a file; each returns a new graph and leaves the given one as it is."""
