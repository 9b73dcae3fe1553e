"""The frozen model: its name (reference), its device, itself (model), and what is fused in it on GPUs."""
