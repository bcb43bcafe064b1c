def damage(*a, **k):
    return iter(())
