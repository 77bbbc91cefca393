"""SLURM: the missing runs of an exhibit as one array, then a dependent job that draws it. Callers of training and exhibits."""
