"""Training a DFlash drafter against a frozen, quantised target, and measuring its acceptance."""
