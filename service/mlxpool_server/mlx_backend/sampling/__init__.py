"""From logits to tokens, for a whole batch whose rows have parameters of their own.

One uniform number a row and position decides (inverse of the cumulative sum), so that the same
seed gives the same tokens alone, in a batch and after a restart, and disturbs nobody.

The filters are mlx-lm's, in its order: bias, repetition, presence and frequency penalty on the
logits; then top_p, min_p, xtc and top_k on the probabilities at temperature 1; then the draw.
"""
