"""Classic models that say whether a language model is worth its price."""
