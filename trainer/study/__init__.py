"""Studies: a named grid of runs, as a table and a figure."""
