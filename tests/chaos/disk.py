def full_disk(*a, **k):
    return iter(())


places = refused_calls = full_disk
