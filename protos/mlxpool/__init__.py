"""mlxpool: generated stubs of the wire contract."""
