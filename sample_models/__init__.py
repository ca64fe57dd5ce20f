"""Small models, one or more for each task, with the scripts that trained them; README.md lists them."""
