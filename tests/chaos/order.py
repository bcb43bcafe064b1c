def order(*a, **k):
    return iter(())
