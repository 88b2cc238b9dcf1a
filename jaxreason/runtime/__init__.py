"""Code that keeps a run alive and records it: checkpoints, resume, journal, logs, locks
and processes.
"""
