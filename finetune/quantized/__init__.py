"""Write quantised Hugging Face folders of a model, read them back and compare."""
