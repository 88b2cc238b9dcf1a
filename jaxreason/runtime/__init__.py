"""Everything that keeps a run alive and records it: checkpoints, resume, journal, logs,
locks, processes.
"""
