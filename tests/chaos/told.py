def told(*a, **k):
    return iter(())
