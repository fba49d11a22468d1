"""Views of a run; a leaf, nothing depends on it."""
