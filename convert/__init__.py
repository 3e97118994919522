"""Checkpoints between formats: export, import, verification, and dense models made into MoE models."""
