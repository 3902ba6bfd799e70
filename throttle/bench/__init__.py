"""What a decision costs: in process, over the wire, and of the whole daemon."""
