"""The generation interface: batched and speculative decoding in plain torch, and its log."""
