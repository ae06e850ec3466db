"""From chat template to text, token ids, label mask and packed rows; the audit."""
