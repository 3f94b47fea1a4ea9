"""Plain and slow ways to the same results, for tests to compare with. Needs mlx."""
