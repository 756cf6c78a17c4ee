"""What is known of one weight without its values: its role, its view, its unfolding, its LoRA scale."""
