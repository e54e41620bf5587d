"""Our methods on other training engines: TRL and verl."""
