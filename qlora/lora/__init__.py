"""Many adapters on one base: the bank, its linear layers, their products (plain and as kernels), and PEFT folders."""
