"""The one training loop and what it needs: data, optimisers, parallel engines, resume."""
