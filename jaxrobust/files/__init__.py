"""Files that are not trusted, and how they are read."""
