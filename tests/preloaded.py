"""For the server of processes.py: the digests of the sources, which take a second, are those of all processes forked from it."""

from functional_sam.records.code import fingerprint

fingerprint()
