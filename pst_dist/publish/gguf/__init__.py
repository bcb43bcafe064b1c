"""The export as a GGUF file, for llama.cpp and the programs built on it (Ollama, LM Studio).

`vocabulary` and `architecture` say what the file contains, `types` how its matrices are stored, `file` writes it,
`engine` runs it in llama.cpp, `artefact` publishes it with its card.
"""
