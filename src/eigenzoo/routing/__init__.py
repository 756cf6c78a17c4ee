"""Which models of a bundle answer an input: features and a few examples per model in, models, weights and abstentions out."""
