"""Selective MXFP4 quantisation-aware training: the experts live on the FP4 grid, the rest stays in BF16."""
