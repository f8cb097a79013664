"""Loading, log-probs and scores of branch batches, sampling."""
