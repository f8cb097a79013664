"""Language models: loading, saving, log-probs and scores of branch batches, and sampling."""
