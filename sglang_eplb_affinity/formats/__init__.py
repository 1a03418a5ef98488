"""Files of others and our own: one reader and one writer for each format."""
