"""Ask a trained student many questions: read them, answer them in windows, and write one line for each.

`files` runs the whole task; `windows` cuts the questions and answers them in this process. `clusters.ray.answer`
answers the same windows on a Ray cluster.
"""
