"""Pure functions over rows, texts and token ids; nothing above numpy and pyarrow."""
