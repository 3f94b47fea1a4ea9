"""The mlxpool server: a gRPC front, one model pool, one engine thread."""
