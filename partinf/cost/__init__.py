"""What one step costs, from roles and shapes alone: FLOPs, bytes, collectives and seconds as a ledger of named entries."""
