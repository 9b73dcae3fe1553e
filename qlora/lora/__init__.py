"""Owns LoRA adapters, many of them on one base. Read in this order:

products        the LoRA products of many adapters over one stream, and their gradients, in plain PyTorch
tables          what the GPU's kernels look up: parts of a pass, and adapters by address
kernels         the same products as launches of Triton kernels
programs, gradient_programs   what those kernels do with a tile of tokens
adapter         one adapter: its weights as one vector, its matrices as views
banked_linear   a linear layer that adds the products of the adapters that a pass is routed through
targets         which linear layers an adapter is put on, by name
bank            all adapters on one base, and the way of a pass through them
peft_folder     adapters on disk, in PEFT's layout
"""
