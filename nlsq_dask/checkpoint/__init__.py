"""What a fit has found out so far, saved so that it goes on to the same bits."""
