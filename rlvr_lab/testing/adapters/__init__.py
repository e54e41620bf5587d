"""One module per card: `RULES`, which map the keys of golden cases to calls of the library, and no formula."""
