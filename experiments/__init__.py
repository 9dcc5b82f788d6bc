"""Programs that train, unlearn, compare and report."""
