"""What a person reads: tables, the model card, the HTML report."""
