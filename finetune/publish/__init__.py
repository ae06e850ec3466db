"""What a push holds: licenses, model card, verification on the Hub."""
