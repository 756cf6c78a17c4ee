"""Files of torch.save: looked at before anything is loaded, and read only where the user allows it."""
