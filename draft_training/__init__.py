"""Training a drafter (DFlash, or EAGLE as its baseline) against a frozen, quantised target, and acceptance."""
