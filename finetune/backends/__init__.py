"""Every third-party training or network library, one concern a file."""
