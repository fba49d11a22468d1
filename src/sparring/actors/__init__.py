"""Who writes responses."""
