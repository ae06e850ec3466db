"""Write GGUF, read it back, score it; llama.cpp and Ollama."""
