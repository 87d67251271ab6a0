"""Training: recipes, freezing, adapters, the trainer and the run itself."""
