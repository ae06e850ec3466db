"""Publishing: contents of a push, licences, model card, verification on the Hub."""
