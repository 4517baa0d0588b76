"""How strong a push must be: curves over alpha, their laws, and the strength to use."""
