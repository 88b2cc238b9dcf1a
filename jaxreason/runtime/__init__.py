"""What keeps a run alive and records it: where it continues, and its journal."""
