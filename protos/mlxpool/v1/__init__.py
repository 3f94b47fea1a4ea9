"""The v1 contract: model_service and memory_service."""
