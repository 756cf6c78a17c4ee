"""Serve the models of a bundle over HTTP, as OpenAI's API: `eigenzoo serve`."""
