"""The Shepherd Model Gateway's protocol for its workers. Needs the extra `gateway`."""
