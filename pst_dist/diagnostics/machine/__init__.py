"""`pst doctor`: what on this machine would make a run fail, found before it starts."""
