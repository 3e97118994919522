"""Sharded safetensors in and out: streamed, strict, atomic."""
