"""The runtime: generate, serve and validate what the other pipelines made."""
