"""`pst doctor`: finds what on this machine would make a run fail, before it starts."""
