"""Making data sets: archives and other layouts to a folder or to shards, inspection, and the drawn demo set."""
