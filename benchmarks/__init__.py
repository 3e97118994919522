"""Commands behind every figure in README and docs; RESULTS.md has their rows."""
