"""Model classes, geometry presets, and the doors for weights: `load_model`, `save_model`."""
