"""LoRA adapters (Hu et al. 2021): files, what they hold, and the layers that they change."""
