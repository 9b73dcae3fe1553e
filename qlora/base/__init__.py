"""Owns the frozen base model. Read in this order:

reference   from a base's name to a folder or a hub id
device      the device of this process, its dtype and its free memory
model       from a reference to one frozen model in NF4, its tokenizer and its shape
fused       one kernel in place of several, on GPUs; norms, residuals: some of them; residual_kernel: one
nf4         values of weights that stay in NF4, by the faster of two kernels; nf4_kernel: one of them
compiling   kernels compiled by several threads, before anything launches them
siblings    one product in place of three, where nothing is to be trained
"""
