"""What a fit says: parameters, their uncertainty, diagnostics, and more on request."""
