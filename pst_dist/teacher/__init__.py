"""Rationales from a teacher: a model behind an OpenAI-compatible endpoint, or one in this process.

`questions` reads the rows, `prompts` and `examples` say what is asked, `endpoint` and `local` ask it, `journal` keeps
every reply, `asking` runs the requests, `judging` decides which replies become rationales, `new_questions` makes
further rows, `report` shows how good they are, and `teach` does all of it in order.
"""
