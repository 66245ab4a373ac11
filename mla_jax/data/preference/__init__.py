"""Preference pairs: where they come from, one source a file, and how they lie in rows."""
