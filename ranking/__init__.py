"""The models, one paper per file, and the request path: what training, evaluation and serving share."""
