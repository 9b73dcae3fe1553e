"""Owns packed sequences: many examples in one stream without padding. Read in this order:

stream            what a stream is: its parts, its tensors, and who attends to whom
packing           how examples become groups that fit a budget, and groups a stream
attention         how a transformers model attends over a stream
flash_attention   the same attention by FlashAttention's kernels, on GPUs; join_kernel: of two such, one
"""
