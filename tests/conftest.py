"""BLAS before MLX: without it MLX's Linux CPU build is 25 times slower in every test."""

from mlxpool_server.mlx_backend.openblas import load_openblas

load_openblas()
