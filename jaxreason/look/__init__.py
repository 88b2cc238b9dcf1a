"""Tools to look at finished runs: each module is an entry point of its own and reads
only run folders.
"""
