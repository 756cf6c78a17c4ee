"""Properties of one weight without its values: role, view, unfolding and LoRA scale."""
