"""`python -m finetune`, which `accelerate launch -m finetune` needs."""

from finetune.cli.main import main

if __name__ == "__main__":
    main()
