"""Parameters: names, shapes, starts and bounds; ties between them; priors and penalties on them."""
