"""Label scores to decisions: probabilities, labels, the predictions file."""
