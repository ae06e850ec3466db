"""Parts of `finetune init`: columns of a file, sizes, a preview row, other tools' files."""
