"""Sample sets: format, shards, writing, selection, imports, buckets."""
