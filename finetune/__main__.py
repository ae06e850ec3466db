"""`python -m finetune`, which `accelerate launch -m finetune` needs."""

from finetune.cli import main

if __name__ == "__main__":
    main()
