"""LoRA adapters: PEFT's folders, and the files of diffusion tools under their own names."""
